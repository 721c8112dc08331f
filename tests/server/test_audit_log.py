from __future__ import annotations

import attrs
from fixtures.fake_engine import MODEL
from fixtures.server_client import BATCH

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


async def test_entries_are_filtered_by_time_and_paged(client):
    """start_time, end_time, limit and offset cut the chain; a malformed time is refused."""
    run = await client.create(MODEL)
    await client.run(f"{run}/forward_backward", {"batch": BATCH})
    whole = entries_of(await client.get("/v1/audit_logs"))
    assert len(whole) == 3
    page = entries_of(await client.get("/v1/audit_logs?limit=1&offset=1"))
    assert page == whole[1:2]
    assert (await client.get("/v1/audit_logs?end_time=2000-01-01T00:00:00Z")).json == []
    assert len((await client.get("/v1/audit_logs?start_time=2000-01-01T00:00:00Z")).json) == 3
    assert (await client.get("/v1/audit_logs?start_time=yesterday")).status == 422
