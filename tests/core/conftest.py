"""The core's tests live on one loop: the client's home, the scripted server and the test itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from blockbuster import blockbuster_ctx
from fixtures.client import LOOPS, TG, Toy, connect_here
from fixtures.server import ScriptedServer


@pytest.fixture(autouse=True)
def never_blocks() -> Iterator[None]:
    """Fail a test that blocks the loop."""
    with blockbuster_ctx() as buster:
        buster.functions["os.stat"].deactivate()  # imports stat files; they happen once
        yield


@pytest.fixture(autouse=True)
async def leaves_no_task() -> AsyncIterator[None]:
    """Fail a test that leaves a task running on its loop."""
    before = asyncio.all_tasks()
    yield
    left: set[object] = set()
    for _ in range(1000):
        left = {*asyncio.all_tasks()} - before - {asyncio.current_task()}
        if not left:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"the test left tasks behind: {left}")


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    """A scripted server on this loop."""
    server = ScriptedServer()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture(params=[TG, LOOPS], ids=["tg", "loops"])
async def either(server: ScriptedServer, request: pytest.FixtureRequest) -> AsyncIterator[Toy]:
    """A client of each wire."""
    client = connect_here(server.url, base=request.param)
    yield client
    await client.core.service.aclose()


@pytest.fixture
async def toy(server: ScriptedServer) -> AsyncIterator[Toy]:
    """A client of the TG wire."""
    client = connect_here(server.url)
    yield client
    await client.core.service.aclose()
