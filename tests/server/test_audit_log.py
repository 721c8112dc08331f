from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sqlite3
from datetime import UTC, datetime

import attrs
import pytest
from fixtures.fake_engine import MODEL
from fixtures.server_client import BATCH
from sqlalchemy import delete
from sqlalchemy.exc import OperationalError

from tg_tinker import ServiceClient
from tg_tinker.server.auth import new_key
from tg_tinker.server.middleware import ROOMS
from tg_tinker.server.ownership import folder_of
from tg_tinker.server.records import background_writer, trail
from tg_tinker.service.evidence import Evidence
from tg_tinker.store.audit import HeadSigner
from tg_tinker.store.tables import audit
from tg_tinker.types.results import AuditLogEntry
from tg_tinker.verify import AuditHead, verify_audit_log
from tg_tinker.wire import codec


def entries_of(answer) -> list[AuditLogEntry]:
    """The entries of an answer, as values."""
    return [codec.decode(AuditLogEntry, fields) for fields in answer.json]


async def test_every_operation_leaves_its_two_entries_exactly_once(client, engine):
    """Accepted and ended, once each, failures, cancels and retries included, with digests that are keyed."""
    run = await client.create(MODEL)
    run_id = run.rpartition("/")[2]
    for _ in range(2):
        future = await client.submit(f"{run}/forward_backward", {"batch": BATCH}, Idempotency_Key="once")
    await client.result(future)
    await client.run(f"{run}/optim_step")
    await client.run(f"{run}/optim_step")  # fails: no gradient
    artifact = (await client.post(f"{run}/save_state")).json["artifact_id"]
    await client.get(f"/v1/artifacts/{artifact}/content")
    entries = entries_of(await client.get(f"/v1/audit_logs?training_client_id={run_id}"))
    assert [(entry.operation, entry.event, entry.success) for entry in entries] == [
        ("create_training_client", "ended", True),
        ("forward_backward", "accepted", None), ("forward_backward", "ended", True),
        ("optim_step", "accepted", None), ("optim_step", "ended", True),
        ("optim_step", "accepted", None), ("optim_step", "ended", False),
        ("save_state", "accepted", None), ("save_state", "ended", True),
        ("pull_artifact", "ended", True),
    ]  # fmt: skip
    assert entries[6].error_code == "VALIDATION_ERROR"
    assert entries[8].artifact_ids_produced == entries[9].artifact_ids_consumed == (artifact,)
    assert entries[1].input_digest.startswith("hmac-sha256:")
    assert entries[2].duration_ms >= 0


async def test_each_tenant_has_a_chain_that_verifies_with_its_head(client):
    """Interleaved tenants have chains of their own; the signed head vouches for the whole; tampering is found."""
    other = client.as_tenant("other-key")
    runs = [(client, await client.create(MODEL)), (other, await other.create(MODEL))]
    for _ in range(3):
        for who, run in runs:
            await who.run(f"{run}/forward_backward", {"batch": BATCH})
    for who, tenant in ((client, "tenant-a"), (other, "tenant-b")):
        entries = entries_of(await who.get("/v1/audit_logs?limit=1000"))
        head = codec.decode(AuditHead, (await who.get("/v1/audit_logs/head")).json)
        assert {entry.tenant_id for entry in entries} == {tenant}
        assert verify_audit_log(entries, tenant_id=tenant, heads=[head]).ok
        assert not verify_audit_log(entries[:-1], tenant_id=tenant, heads=[head]).ok
        forged = [*entries[:2], attrs.evolve(entries[2], success=False), *entries[3:]]
        assert verify_audit_log(forged, tenant_id=tenant).first_bad == 3


async def test_denied_access_leaves_a_trace(client):
    """Asking for what belongs to another tenant is recorded in the chain of who asked."""
    run = await client.create(MODEL)
    other = client.as_tenant("other-key")
    assert (await other.get(run)).status == 404
    (entry,) = entries_of(await other.get("/v1/audit_logs?operation=denied"))
    assert (entry.success, entry.error_code) == (False, "TRAINING_CLIENT_NOT_FOUND")


async def test_the_use_of_a_lapsed_key_leaves_a_trace(serve):
    """Who still uses a revoked key is on record in the log of its tenant, once in a while; who guesses one is not."""
    client = await serve()
    text, row = new_key("tenant-a")
    database = client.server.app[ROOMS].database
    await database.add_tenant("tenant-a", row.created_at)
    await database.add_api_key(row)
    await database.revoke_api_key(row.key_id, datetime.now(UTC))
    for key in (text, text, text[:-1] + ("a" if text[-1] != "a" else "b"), f"tg_{'0' * 16}_{'a' * 43}"):
        assert (await client.as_tenant(key).get("/v1/futures")).status == 401
    (entry,) = entries_of(await client.get("/v1/audit_logs?operation=denied"))
    assert (entry.error_code, row.key_id in entry.error_message) == ("AUTHENTICATION_REQUIRED", True)
    assert text not in json.dumps(entry.to_dict(), default=str)


async def test_a_failure_that_is_told_again_is_no_denial(client, engine):
    """An operation on what is not there has its two entries, however often it is retried, and however it is asked."""
    run = await client.create(MODEL)
    body = {"artifact_id": "art-" + "0" * 32}
    for _ in range(2):
        assert (await client.post(f"{run}/load_state", body, Idempotency_Key="once")).status == 404
    future = await client.submit(f"{run}/load_state", body, Idempotency_Key="once")
    assert (await client.result(future))["error"]["code"] == "ARTIFACT_NOT_FOUND"
    _, *entries = entries_of(await client.get("/v1/audit_logs"))
    assert [(one.operation, one.event) for one in entries] == [("load_state", "accepted"), ("load_state", "ended")]


async def test_entries_are_filtered_by_time_and_paged(client):
    """start_time, end_time, limit and offset cut the chain; a malformed time, or a limit out of range, is refused."""
    run = await client.create(MODEL)
    await client.run(f"{run}/forward_backward", {"batch": BATCH})
    whole = entries_of(await client.get("/v1/audit_logs"))
    assert len(whole) == 3
    page = entries_of(await client.get("/v1/audit_logs?limit=1&offset=1"))
    assert page == whole[1:2]
    assert (await client.get("/v1/audit_logs?end_time=2000-01-01T00:00:00Z")).json == []
    assert len((await client.get("/v1/audit_logs?start_time=2000-01-01T00:00:00Z")).json) == 3
    assert (await client.get("/v1/audit_logs?start_time=yesterday")).status == 422
    for limit in (0, 1001):
        refused = await client.get(f"/v1/audit_logs?limit={limit}")
        assert (refused.status, refused.error["details"]["field"]) == (422, "limit")


@contextlib.asynccontextmanager
async def log_on_disk(client):
    """The audit log as another process reads it: what is durable and nothing else."""
    from tg_tinker.store.audit import AuditLog, HeadSigner
    from tg_tinker.store.database import Database, database_file
    from tg_tinker.store.sqlite import sqlite_url

    home = client.server.app[ROOMS].settings.home
    database = await Database.open(sqlite_url(database_file(home)))
    try:
        yield AuditLog(database, HeadSigner(home / "secrets" / "audit-key"))
    finally:
        await database.close()


async def test_what_only_the_audit_log_knows_is_durable_before_it_is_answered(client, monkeypatch):
    """Creations, saves, pulls, deletions and denials are in the log on disk when their answer arrives."""
    monkeypatch.setattr(client.server.app[ROOMS].auditing._writer, "_linger", 3600.0)  # nobody writes by the way
    async with log_on_disk(client) as log:

        async def last() -> tuple[str, str]:
            entry = (await log.entries("tenant-a", limit=1000))[-1]
            return entry.operation, entry.event

        run = await client.create(MODEL)
        assert await last() == ("create_training_client", "ended")
        artifact = (await client.post(f"{run}/save_state")).json["artifact_id"]
        assert await last() == ("save_state", "ended")
        await client.get(f"/v1/artifacts/{artifact}/content")
        assert await last() == ("pull_artifact", "ended")
        await client.run(f"{run}/load_state", {"artifact_id": artifact})
        assert await last() == ("load_state", "ended")
        await client.call("DELETE", f"/v1/artifacts/{artifact}")
        assert await last() == ("delete_artifact", "ended")
        await client.get("/v1/training_clients/tc-not-mine")
        assert await last() == ("denied", "ended")
        await client.call("DELETE", run)
        assert await last() == ("delete_training_client", "ended")


async def test_an_ordinary_result_does_not_wait_for_the_audit_log(client, monkeypatch):
    """A pass is answered while its entries still wait to be written; the trail has them by then."""
    run = await client.create(MODEL)
    monkeypatch.setattr(client.server.app[ROOMS].auditing._writer, "_linger", 3600.0)
    future = await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    assert (await client.result(future))["status"] == "completed"
    async with log_on_disk(client) as log:
        assert [entry.operation for entry in await log.entries("tenant-a")] == ["create_training_client"]
    folder = folder_of(client.server.app[ROOMS].settings.home)
    (owner,) = trail.owners(folder)
    events = [event for event, _ in trail.read(folder, owner) if event.operation_id == future.rpartition("/")[2]]
    assert [event.event for event in events] == ["accepted", "ended"]


async def test_nothing_is_pulled_while_the_log_cannot_be_written(client, monkeypatch):
    """A pull, and the result of a save, are refused with a typed error; passes go on; all is told when it is well."""
    run = await client.create(MODEL)
    artifact = (await client.post(f"{run}/save_state")).json["artifact_id"]
    auditing = client.server.app[ROOMS].auditing
    monkeypatch.setattr(background_writer, "_RETRY", 0.01)
    monkeypatch.setattr(auditing._writer, "_patience", 0.05)
    append_all = auditing.log.append_all

    async def refuse(_):
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked"))

    monkeypatch.setattr(auditing.log, "append_all", refuse)
    pull = await client.get(f"/v1/artifacts/{artifact}/content")
    assert (pull.status, pull.error["code"]) == (500, "RECORDS_NOT_WRITTEN")
    saving = await client.submit(f"{run}/save_state")
    assert (await client.result(saving))["error"]["code"] == "RECORDS_NOT_WRITTEN"
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["status"] == "completed"
    monkeypatch.setattr(auditing.log, "append_all", append_all)
    monkeypatch.setattr(auditing._writer, "_patience", 20.0)
    assert (await client.result(saving))["status"] == "completed"
    entries = entries_of(await client.get("/v1/audit_logs"))
    assert len({(entry.operation_id, entry.event) for entry in entries}) == len(entries) == 8


async def test_a_save_that_replaces_another_says_so(client):
    """Saving under a name again deletes what had it: that entry names both artifacts."""
    trainer, _ = await client.trainer(MODEL)
    for _ in range(2):
        await client.operate(trainer, "save_state", {"name": "kept"})
    _, first, _, second = entries_of(await client.get("/v1/audit_logs?operation=save_state"))
    assert (first.artifact_ids_consumed, second.artifact_ids_consumed) == ((), first.artifact_ids_produced)
    assert len(second.artifact_ids_produced) == 1


async def test_a_file_of_a_checkpoint_leaves_with_an_entry(client):
    """A signed URL opens a checkpoint outside of its seal: each use of it is on record, one in vain too."""
    trainer, _ = await client.trainer(MODEL)
    await client.operate(trainer, "save_state", {"name": "kept"})
    run_id = trainer.rpartition("/")[2]
    (artifact,) = (await client.get(f"/v1/artifacts?training_client_id={run_id}")).json
    listed = await client.get(f"/v1/loops/checkpoints/{artifact['artifact_id']}/files")
    (first, *_) = listed.json["presigned_urls"]
    path = first["url"].removeprefix(str(client.server.make_url("")).rstrip("/"))
    assert (await client.get(path)).status == 200
    assert (await client.call("DELETE", f"/v1/artifacts/{artifact['artifact_id']}")).status == 200
    assert (await client.get(path)).status == 404
    entries = entries_of(await client.get("/v1/audit_logs?operation=pull_checkpoint_file"))
    assert [(entry.success, entry.error_code) for entry in entries] == [(True, None), (False, "ARTIFACT_NOT_FOUND")]
    assert {entry.artifact_ids_consumed for entry in entries} == {(artifact["artifact_id"],)}


async def test_a_creation_that_fails_leaves_an_entry(client):
    """A run that could not be made, on either surface and for whatever reason, is on record with why."""
    assert (await client.post("/v1/training_clients", {"model_ref": "no/model"})).status == 404
    assert (await client.post("/v1/loops/trainers", {"base_model": "no/model", "lora_rank": 4})).status >= 400
    lost = await client.post("/v1/training_clients", {"model_ref": MODEL, "checkpoint_id": "art-" + "0" * 32})
    assert lost.status == 404
    entries = entries_of(await client.get("/v1/audit_logs?operation=create_training_client"))
    assert [(entry.success, entry.error_code) for entry in entries] == [
        (False, "MODEL_NOT_FOUND"), (False, "MODEL_NOT_FOUND"), (False, "ARTIFACT_NOT_FOUND"),
    ]  # fmt: skip
    assert entries_of(await client.get("/v1/audit_logs?operation=delete_training_client")) == []


async def test_an_entry_that_cannot_be_encoded_is_replaced_by_one_that_says_so(client, caplog):
    """The count stays true, the rest is written, and the server's log says what was wrong."""
    auditing, waiting = client.server.app[ROOMS].auditing, []
    for number, epsilon in enumerate((0.5, float("nan"), 0.25)):
        metrics = {"total_epsilon": epsilon}
        waiting.append(auditing.happened("tenant-a", "optim_step", f"op-{number}", dp_metrics=metrics))
    await asyncio.gather(*waiting)
    entries = entries_of(await client.get("/v1/audit_logs"))
    assert [(entry.operation_id, entry.success, entry.error_code) for entry in entries] == [
        ("op-0", True, None), ("op-1", True, "ENTRY_NOT_ENCODED"), ("op-2", True, None),
    ]  # fmt: skip
    assert "a row cannot be written" in caplog.text
    assert verify_audit_log(entries, tenant_id="tenant-a").ok


async def test_a_new_server_brings_the_head_of_what_it_finds(serve):
    """The first answer of a restarted server, a mere read, vouches for what is in the log: for each tenant its own."""
    first = await serve()
    await first.create(MODEL)
    await first.server.close()
    second = await serve()
    answers = [await who.get("/v1/training_clients") for who in (second, second.as_tenant("other-key"))]
    heads = [codec.decode(AuditHead, codec.loads(one.headers["X-TG-Audit-Head"].encode())) for one in answers]
    assert [(head.tenant_id, head.sequence) for head in heads] == [("tenant-a", 1), ("tenant-b", 0)]


async def test_answers_bring_the_head_of_what_was_written(client, monkeypatch):
    """Each tenant's answers carry its own signed head, signed once for a batch and not for each answer."""
    other = client.as_tenant("other-key")
    for who in (client, other):
        await who.get("/v1/futures")  # for a tenant's first answer the log is looked up
    signer = client.server.app[ROOMS].auditing.log._signer
    signed, sign = [], signer.sign
    monkeypatch.setattr(signer, "sign", lambda *asked: signed.append(asked) or sign(*asked))
    heads = {}
    for who, tenant in ((client, "tenant-a"), (other, "tenant-b")):
        await who.create(MODEL)
        answers = [await who.get("/v1/futures") for _ in range(5)]
        (head,) = {answer.headers["X-TG-Audit-Head"] for answer in answers}
        heads[tenant] = codec.decode(AuditHead, codec.loads(head.encode()))
    assert len(signed) == 2
    for who, tenant in ((client, "tenant-a"), (other, "tenant-b")):
        entries = entries_of(await who.get("/v1/audit_logs"))
        assert heads[tenant].sequence == len(entries) == 1
        assert verify_audit_log(entries, tenant_id=tenant, heads=[heads[tenant]]).ok
    assert "X-TG-Audit-Head" not in (await client.as_tenant(None).get("/healthz")).headers


@pytest.mark.parametrize("regrown", [False, True])
async def test_a_service_client_finds_out_that_the_log_was_cut_off(client, regrown):
    """It holds the log against heads that came with answers, also when the log has grown beyond them again."""
    async with ServiceClient("test-key", str(client.server.make_url(""))) as service:
        run = await service.create_training_client_async({"model_ref": MODEL})
        await (await run.forward_backward_async(BATCH))
        await service.get_audit_logs_async()
        assert (await service.verify_audit_log_async()).ok
        newest = service.audit_heads[-1]
        assert newest.sequence == 3
        async with log_on_disk(client) as log, log._database.writing() as connection:
            await connection.execute(delete(audit).where(audit.c.sequence > 1))
        if regrown:
            for _ in range(4):
                await (await run.forward_backward_async(BATCH))
            await service.list_futures_async()
        checked = await service.verify_audit_log_async()
        assert not checked.ok
        assert ("rewritten" if regrown else "truncated: 3 entries were signed for, 1 are there") in checked.reason


def test_a_client_keeps_the_newest_heads_and_a_spread_of_the_others(tmp_path):
    """However many heads come, a bounded number is kept; what is no head is not, and one that comes again is once."""
    signer, evidence = HeadSigner(tmp_path / "key"), Evidence()
    for sequence in range(1, 1001):
        told = codec.dumps(signer.sign("acme", sequence, f"sha256:{sequence}").to_dict()).decode()
        for _ in range(2):
            evidence.hear({"X-TG-Audit-Head": told})
    evidence.hear({"X-TG-Audit-Head": "not a head"})
    evidence.hear({})
    kept = [head.sequence for head in evidence.heads]
    assert kept[0] == 1
    assert kept[-64:] == list(range(937, 1001))
    assert len(kept) <= 128
    assert {after - before for before, after in itertools.pairwise(kept[:-64])} == {16}


async def test_the_digest_of_inputs_and_signed_urls_have_keys_of_their_own(client):
    """Neither key is the secret on disk, and neither is the other: what one vouches for says nothing to the other."""
    rooms = client.server.app[ROOMS]
    secret = (rooms.settings.home / "secrets" / "server-secret").read_bytes()
    assert len({secret, rooms.auditing._secret, rooms.exports._key}) == 3
