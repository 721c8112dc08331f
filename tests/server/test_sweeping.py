from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from fixtures.fake_engine import MODEL

from tg_tinker.server.middleware import ROOMS
from tg_tinker.server.sweeping import Sweeping


async def test_what_is_past_its_time_is_taken_away(client):
    """An artifact past its ttl and a result past its hour leave the disk; what has no end stays."""
    rooms = client.server.app[ROOMS]
    trainer, _ = await client.trainer(MODEL)
    await client.operate(trainer, "save_state", {"name": "kept", "ttl_seconds": None})
    await client.operate(trainer, "save_state", {"name": "gone", "ttl_seconds": 60})
    await rooms.journal.flush()
    later = datetime.now(UTC) + timedelta(hours=2)
    artifacts, results = await Sweeping(rooms, clock=lambda: later).sweep()
    assert artifacts == 1
    assert results >= 2
    assert [record.name for record in rooms.store.list("tenant-a")] == ["kept"]


async def test_a_sweep_that_fails_is_logged_and_tried_again(client, monkeypatch, caplog):
    """A round that fails says so and ends nothing."""
    rooms = client.server.app[ROOMS]
    calls: list[datetime] = []

    def refuse(now: datetime) -> int:
        calls.append(now)
        raise OSError("disk full")

    monkeypatch.setattr(rooms.store, "sweep", refuse)
    monkeypatch.setattr("tg_tinker.server.sweeping.EVERY", 0.01)
    sweeping = Sweeping(rooms)
    with caplog.at_level(logging.ERROR, "tg_tinker.server"):
        sweeping.start()
        while len(calls) < 2:
            await asyncio.sleep(0.01)
        await sweeping.aclose()
    assert "disk full" in caplog.text
