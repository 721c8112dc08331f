"""Bursts of requests: few connections where the server is quick, no queue where it is slow."""

from __future__ import annotations

import asyncio

import pytest
from fixtures.client import Toy
from fixtures.server import ScriptedServer

from tg_tinker.core import gate
from tg_tinker.core.gate import Gate


async def test_a_quick_server_sees_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered requests make room for the next ones; never more than the width are under way."""
    monkeypatch.setattr(gate, "PATIENCE", 60.0)
    narrow, inside, most = Gate(width=4), 0, 0

    async def request() -> None:
        nonlocal inside, most
        async with narrow.slot():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(request() for _ in range(50)))
    assert most == 4


async def test_a_slow_server_gets_them_all() -> None:
    """A request that is not answered soon lets others go, so that nobody waits for its answer."""
    narrow, answer, inside = Gate(width=4), asyncio.Event(), 0

    async def request() -> None:
        nonlocal inside
        async with narrow.slot():
            inside += 1
            await answer.wait()

    requests = [asyncio.ensure_future(request()) for _ in range(20)]
    while inside < 20:
        await asyncio.sleep(0.01)
    answer.set()
    await asyncio.gather(*requests)
    assert narrow._slots._value == 4, "every slot came back, and none twice"


async def test_a_request_cancelled_in_line_takes_no_slot() -> None:
    """Who gives up before being let through leaves the gate as it was."""
    narrow = Gate(width=1)
    async with narrow.slot():
        waiting = asyncio.ensure_future(narrow.slot().__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert narrow._slots._value == 1


async def test_a_burst_of_requests_is_answered(server: ScriptedServer, toy: Toy) -> None:
    """Hundreds of concurrent calls through one connection pool."""
    answers = await asyncio.gather(*(toy.health_async() for _ in range(300)))
    assert len(answers) == 300
