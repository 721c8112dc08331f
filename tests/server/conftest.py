"""The real application, in-process, with an engine that needs no model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from aiohttp import ClientSession, DummyCookieJar
from aiohttp.test_utils import TestServer
from fixtures.fake_engine import FakeEngine
from fixtures.server_client import KEY, OTHER_KEY, Client

from tg_tinker.server.app import create_app
from tg_tinker.server.settings import Settings

Serve: TypeAlias = Callable[..., Coroutine[Any, Any, Client]]


@pytest.fixture
def engine() -> FakeEngine:
    """The engine behind ``client``."""
    return FakeEngine()


@pytest.fixture
async def serve(tmp_path: Path, engine: FakeEngine) -> AsyncIterator[Serve]:
    """Start servers on one home; each call gives a client of a new one."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(ClientSession(cookie_jar=DummyCookieJar()))

        async def start(engine: Any = engine, **fields: Any) -> Client:
            keys = {KEY: "tenant-a", OTHER_KEY: "tenant-b"}
            settings = Settings(**{"home": tmp_path, "keys": keys, "hold": 20.0, **fields})
            server = TestServer(create_app(settings, engine=engine))
            await server.start_server(shutdown_timeout=20.0)
            stack.push_async_callback(server.close)
            return Client(server, session)

        yield start
        for gate in (engine.gate, engine.tick_gate, engine.load_gate):
            gate.set()


@pytest.fixture
async def client(serve: Serve) -> Client:
    """A client of one server."""
    return await serve()
