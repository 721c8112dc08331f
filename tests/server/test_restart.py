from __future__ import annotations

import asyncio
import os
import sqlite3
from functools import partial
from pathlib import Path

from fixtures.fake_engine import MODEL, FakeEngine
from fixtures.server_client import BATCH, datum
from sqlalchemy.exc import OperationalError

from tg_tinker.server.middleware import ROOMS
from tg_tinker.server.ownership import folder_of
from tg_tinker.server.records import trail
from tg_tinker.server.records.tickets import Ticket
from tg_tinker.store.audit import AuditEvent
from tg_tinker.types.results import AuditLogEntry
from tg_tinker.verify import verify_audit_log
from tg_tinker.wire import codec


async def test_results_are_found_after_a_restart(serve):
    """A finished future, its result and its listing survive the server, by id and on both wires."""
    first = await serve()
    run = await first.create(MODEL)
    future = await first.submit(f"{run}/forward_backward", {"batch": BATCH})
    result = await first.result(future)
    trainer, _ = await first.trainer(MODEL)
    outcome = await first.operate(trainer, "forward_backward", {"data": [datum(1, 2)]}, key="loops-key")
    failed = await first.operate(trainer, "load_state", {"path": "bt://loops:none/weights/x"}, key="bad-key")
    await first.server.close()
    second = await serve(engine=FakeEngine())
    assert await second.result(future) == result
    assert (await second.get(future)).json["operation"] == "forward_backward"
    assert (await second.get(f"{trainer}/operations/loops-key")).json == outcome
    told = (await second.get(f"{trainer}/operations/bad-key")).json
    assert (told["status"], told["code"]) == ("error", failed["code"])
    operations = [one["operation"] for one in (await second.get("/v1/futures")).json]
    assert operations == ["load_state", "forward_backward", "forward_backward"]
    assert (await second.as_tenant("other-key").get(future)).status == 404


async def test_what_had_not_finished_is_a_typed_error(serve, engine):
    """A future that its server did not finish says SERVER_RESTARTED; its run says what to do."""
    first = await serve()
    run = await first.create(MODEL)
    engine.gate.clear()
    future = await first.submit(f"{run}/forward_backward", {"batch": BATCH})
    await first.server.app[ROOMS].journal.flush()
    closing = asyncio.create_task(first.server.close())
    (ticket,) = first.server.app[ROOMS].tickets
    await ticket.wait(None)
    engine.gate.set()
    await closing
    second = await serve(engine=FakeEngine())
    outcome = await second.result(future)
    assert (outcome["status"], outcome["error"]["code"]) == ("failed", "SERVER_RESTARTED")
    gone = await second.get(run)
    assert (gone.status, gone.error["code"]) == (410, "SERVER_RESTARTED")
    assert "saved state" in gone.error["message"]


async def test_a_server_that_died_is_noticed_by_another_on_its_home(serve, engine):
    """Unfinished futures of a process that vanished are failed by a server that starts, or is asked, later."""
    first = await serve()
    run = await first.create(MODEL)
    engine.gate.clear()
    future = await first.submit(f"{run}/forward_backward", {"batch": BATCH})
    rooms = first.server.app[ROOMS]
    await rooms.journal.flush()
    second = await serve(engine=FakeEngine())
    assert (await second.result(future, wait=0))["status"] in {"pending", "running"}  # its server lives
    rooms._storage.ownership.release()  # what the system does for a process that was killed
    outcome = await second.result(future)
    assert outcome["error"]["code"] == "SERVER_RESTARTED"
    rooms._storage.ownership.__init__(rooms.settings.home)
    engine.gate.set()


async def test_a_shutdown_answers_everybody_who_waits(serve, engine):
    """A held poll and a held version wait are answered when the server goes down, not cut off."""
    client = await serve()
    run = await client.create(MODEL)
    _, sampler = await client.trainer(MODEL)
    engine.gate.clear()
    future = await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    asked = client.server.handler.requests_count
    poll = asyncio.create_task(client.result(future, wait=20))
    version = asyncio.create_task(client.get(f"{sampler}/trainers_policy_version?min=5&wait=20"))
    async with asyncio.timeout(30):
        while client.server.handler.requests_count < asked + 2:
            await asyncio.sleep(0.005)
    closing = asyncio.create_task(client.server.close())
    async with asyncio.timeout(30):
        while not client.server.app[ROOMS].scheduler._closed:  # then no second micro-batch comes
            await asyncio.sleep(0.005)
    engine.gate.set()
    await closing
    assert (await poll)["error"]["code"] == "SERVER_RESTARTED"
    assert (await version).json == {"policy_version": 0}


async def test_a_save_under_way_is_finished_before_the_end(serve, engine):
    """A server that is closed while it seals an artifact finishes it; the artifact opens afterwards."""
    first = await serve()
    run = await first.create(MODEL)
    await first.submit(f"{run}/save_state", {"metadata": {"kept": True}})
    async with asyncio.timeout(30):
        while not (await first.get("/v1/futures?status=running")).json and not (await first.get("/v1/artifacts")).json:
            await asyncio.sleep(0.005)
    await first.server.close()
    second = await serve(engine=FakeEngine())
    (artifact,) = (await second.get("/v1/artifacts")).json
    resumed = await second.create(MODEL, checkpoint_id=artifact["artifact_id"])
    assert (await second.get(resumed)).json["step"] == 0


async def test_large_results_leave_memory_and_come_back_from_disk(serve, monkeypatch):
    """Over the memory bound, results that the database has are dropped and read back from there."""
    client = await serve(result_bytes_kept=1)
    trainer, _ = await client.trainer(MODEL)
    first = await client.operate(trainer, "forward", {"data": [datum(1, 2)]}, key="first")
    tickets = client.server.app[ROOMS].tickets
    await client.server.app[ROOMS].journal.flush()
    monkeypatch.setattr(tickets, "_swept", 0.0)
    await client.operate(trainer, "forward", {"data": [datum(3, 4)]}, key="second")
    assert tickets.find("tenant-a", "first").dropped
    assert (await client.get(f"{trainer}/operations/first")).json == first


async def entries_of(client) -> list[AuditLogEntry]:
    """The tenant's whole audit log, which must be whole."""
    entries = [codec.decode(AuditLogEntry, fields) for fields in (await client.get("/v1/audit_logs?limit=1000")).json]
    assert verify_audit_log(entries, tenant_id="tenant-a").ok
    return entries


def files(folder: Path) -> list[str]:
    """The names of the trails in a folder."""
    return sorted(path.name for path in folder.glob("*.trail"))


def die(client) -> None:
    """Let go of a server's name as the system does when its process is killed; the server itself notices nothing."""
    os.close(client.server.app[ROOMS]._storage.ownership._descriptor)


def live_again(client) -> None:
    """Give the server a name again, which it needs to be closed."""
    rooms = client.server.app[ROOMS]
    rooms._storage.ownership.__init__(rooms.settings.home)


async def test_what_a_dead_server_left_gets_its_entries_exactly_once(serve, engine, monkeypatch):
    """Two servers that find it at the same time, and the dead one's own late writing, add no entry twice."""
    first = await serve()
    run = await first.create(MODEL)
    rooms = first.server.app[ROOMS]
    monkeypatch.setattr(rooms.auditing._writer, "_linger", 3600.0)
    failed = await first.submit(f"{run}/optim_step")  # no gradient
    await first.result(failed)
    done = await first.submit(f"{run}/forward_backward", {"batch": BATCH})
    await first.result(done)
    engine.gate.clear()
    left = await first.submit(f"{run}/forward_backward", {"batch": BATCH})
    await rooms.journal.flush()
    die(first)
    second, _ = await asyncio.gather(serve(engine=FakeEngine()), serve(engine=FakeEngine()))
    found = await entries_of(second)
    live_again(first)
    engine.gate.set()
    await first.result(left)
    await rooms.auditing.flush()
    assert await entries_of(second) == found
    told = {future: future.rpartition("/")[2] for future in (done, failed, left)}
    outcomes = {
        future: [(entry.event, entry.success, entry.error_code) for entry in found if entry.operation_id == future_id]
        for future, future_id in told.items()
    }
    assert outcomes == {
        done: [("accepted", None, None), ("ended", True, None)],
        failed: [("accepted", None, None), ("ended", False, "VALIDATION_ERROR")],
        left: [("accepted", None, None), ("ended", False, "SERVER_RESTARTED")],
    }


async def test_what_only_the_trail_knows_is_told_after_a_crash(serve, engine, monkeypatch):
    """Although nothing reached the database, futures are found and entries are whole: digests, artifacts, keys."""
    first = await serve()
    run = await first.create(MODEL)
    rooms = first.server.app[ROOMS]
    written = asyncio.Event()
    append_all, save_futures = rooms.auditing.log.append_all, rooms.database.save_futures

    async def wait(write, rows):
        async with asyncio.timeout(30):  # as long as the test needs, and no longer should it fail
            await written.wait()
        return await write(rows)

    monkeypatch.setattr(rooms.auditing.log, "append_all", partial(wait, append_all))
    monkeypatch.setattr(rooms.database, "save_futures", partial(wait, save_futures))
    done = await first.submit(f"{run}/forward_backward", {"batch": BATCH}, Idempotency_Key="once")
    assert (await first.result(done))["status"] == "completed"
    saved = await first.submit(f"{run}/save_state")
    (ticket,) = (ticket for ticket in rooms.tickets if ticket.operation == "save_state")
    await ticket.wait(None)
    die(first)
    second = await serve(engine=FakeEngine())
    for future in (done, saved):
        assert (await second.result(future))["error"]["code"] == "SERVER_RESTARTED"
    (row,) = [row for row in await second.server.app[ROOMS].database.list_futures("tenant-a") if row.idempotency_key]
    assert (row.operation, row.idempotency_key) == ("forward_backward", "once")
    found = await entries_of(second)
    assert [(entry.operation, entry.event, entry.success) for entry in found[1:]] == [
        ("forward_backward", "accepted", None), ("forward_backward", "ended", True),
        ("save_state", "accepted", None), ("save_state", "ended", True),
    ]  # fmt: skip
    assert found[1].input_digest.startswith("hmac-sha256:")
    assert found[4].artifact_ids_produced == tuple(ticket.produced)
    live_again(first)
    written.set()
    await rooms.auditing.flush()
    assert await entries_of(second) == found


async def test_a_trail_ends_when_the_database_has_what_is_in_it(serve, monkeypatch):
    """A long file is followed by another and deleted; a server that ends well leaves none, a dead one's is cleared."""
    monkeypatch.setattr(trail, "_LONG", 1000)
    first = await serve()
    folder = folder_of(first.server.app[ROOMS].settings.home)
    run = await first.create(MODEL)
    for _ in range(10):
        await first.run(f"{run}/forward_backward", {"batch": BATCH})
    async with asyncio.timeout(30):
        while not [path for path in folder.glob("*.trail") if ".0." not in path.name] or len(files(folder)) > 1:
            await asyncio.sleep(0.01)
    die(first)
    second = await serve(engine=FakeEngine())
    assert files(folder) == [f"{second.server.app[ROOMS]._storage.ownership.name}.0.trail"]
    live_again(first)
    await second.server.close()
    assert files(folder) == []


async def test_what_the_database_would_not_take_stays_in_the_trail(serve, monkeypatch):
    """A server that ends while the database is locked has lost nothing: the next one writes what it could not."""
    first = await serve()
    run = await first.create(MODEL)
    log = first.server.app[ROOMS].auditing.log
    append_all = log.append_all

    async def refuse(_):
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked"))

    monkeypatch.setattr(log, "append_all", refuse)
    await first.run(f"{run}/forward_backward", {"batch": BATCH})
    await first.server.close()
    monkeypatch.setattr(log, "append_all", append_all)
    second = await serve(engine=FakeEngine())
    found = [(entry.operation, entry.event) for entry in await entries_of(second)]
    assert found[1:] == [("forward_backward", "accepted"), ("forward_backward", "ended")]


def test_a_torn_line_spoils_no_other(tmp_path, caplog):
    """What was not written to its end is named in the log; the steps before and behind it are read."""
    mine = trail.Trail(tmp_path, "server-1-00000000")
    step = AuditEvent(tenant_id="acme", operation="optim_step", operation_id="op-1", event="accepted")
    mine.add(step, "key")
    with next(tmp_path.glob("*.trail")).open("ab") as file:
        file.write(b'\n[{"tenant_id": "ac')
    ended = AuditEvent(
        tenant_id="acme",
        operation="optim_step",
        operation_id="op-1",
        event="ended",
        success=True,
        duration_ms=1.5,
        artifact_ids_produced=("art-1",),
        dp_metrics={"total_epsilon": 0.5},
    )
    mine.turn()
    mine.add(ended)
    assert trail.owners(tmp_path) == {"server-1-00000000"}
    assert trail.read(tmp_path, "server-1-00000000") == [(step, "key"), (ended, None)]
    assert "not written to its end" in caplog.text
    mine.close(keep=False)
    assert files(tmp_path) == []


async def test_a_result_that_cannot_be_kept_holds_up_no_other(serve):
    """The futures around it are written; it itself is found as failed after a restart, with the reason."""
    client = await serve()
    journal = client.server.app[ROOMS].journal
    fields = {"tenant": "tenant-a", "run_id": "tc-1", "operation": "sample", "digest": "", "request_id": None}
    tickets = [Ticket(**fields, key=f"key-{number}") for number in range(3)]
    for ticket, result in zip(tickets, ({"a": 1}, object(), {"c": 3}), strict=True):
        ticket.settle(result, None)
        journal.note(ticket)
    await journal.flush()
    assert [ticket.stored for ticket in tickets] == [True, False, True]
    outcomes = [await client.result(f"/v1/futures/{ticket.id}") for ticket in tickets]
    assert [outcome["result"] for outcome in outcomes] == [{"a": 1}, None, {"c": 3}]
    assert outcomes[1]["error"]["code"] == "RESULT_NOT_KEPT"


async def test_a_result_is_stored_only_when_its_row_has_it(serve, engine, monkeypatch):
    """An end that comes while the acceptance is being written is not taken for written with it."""
    client = await serve()
    run = await client.create(MODEL)
    journal, database = client.server.app[ROOMS].journal, client.server.app[ROOMS].database
    begun, ended, written, save = asyncio.Event(), asyncio.Event(), asyncio.Event(), database.save_futures

    async def slowly(rows):
        begun.set()
        async with asyncio.timeout(30):
            await ended.wait()
        await save(rows)
        written.set()

    monkeypatch.setattr(database, "save_futures", slowly)
    engine.gate.clear()
    await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    await begun.wait()
    monkeypatch.setattr(journal, "note", lambda _: None)  # nothing more is written of it
    engine.gate.set()
    (ticket,) = client.server.app[ROOMS].tickets
    await ticket.wait(None)
    ended.set()
    async with asyncio.timeout(30):
        await written.wait()
        await journal.flush()
    row = await database.get_future("tenant-a", ticket.id)
    assert (ticket.done, ticket.stored, row.finished) == (True, False, False)
