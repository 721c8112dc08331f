from __future__ import annotations

import asyncio

from fixtures.fake_engine import MODEL, FakeEngine
from fixtures.server_client import BATCH, datum

from tg_tinker.server.middleware import ROOMS


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
    rooms._ownership.release()  # what the system does for a process that was killed
    outcome = await second.result(future)
    assert outcome["error"]["code"] == "SERVER_RESTARTED"
    rooms._ownership.__init__(rooms.settings.home)
    engine.gate.set()


async def test_a_shutdown_answers_everybody_who_waits(serve, engine):
    """A held poll and a held version wait are answered when the server goes down, not cut off."""
    client = await serve()
    run = await client.create(MODEL)
    _, sampler = await client.trainer(MODEL)
    engine.gate.clear()
    future = await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    poll = asyncio.create_task(client.result(future, wait=20))
    version = asyncio.create_task(client.get(f"{sampler}/trainers_policy_version?min=5&wait=20"))
    await asyncio.sleep(0.1)
    engine.gate.set()
    await client.server.close()
    assert (await poll)["error"] is None or (await poll)["error"]["code"] == "SERVER_RESTARTED"
    assert (await version).json == {"policy_version": 0}


async def test_a_save_under_way_is_finished_before_the_end(serve, engine):
    """A server that is closed while it seals an artifact finishes it; the artifact opens afterwards."""
    first = await serve()
    run = await first.create(MODEL)
    await first.submit(f"{run}/save_state", {"metadata": {"kept": True}})
    async with asyncio.timeout(10):
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
