"""One server process: its socket, its signals, its log, and the parent whose child it may be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator

from aiohttp import web

from tg_tinker.server.app import create_app
from tg_tinker.server.connection import listen
from tg_tinker.server.middleware import ROOMS
from tg_tinker.server.settings import Settings

_log = logging.getLogger("tg_tinker.server")
_SHUTDOWN_PATIENCE = 5.0  # seconds that open requests get to end
_PARENT_POLL = 1.0  # seconds, where the system has no pidfd


def run(settings: Settings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM, SIGINT, or the end of the parent process.

    ``on_ready`` is told the URL once the socket listens. Raises ``InvalidRequestError`` for an address that must not be
    served without keys, ``OSError`` for one that cannot be had.
    """
    # Before torch is there. By default OpenMP's threads wait for each other by spinning for long, which on cores that
    # others use makes two threads several times slower than one; not at all, and two are no faster than one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    asyncio.run(_serve(settings, on_ready))


def announce(url: str) -> None:
    """Say on standard output, as one line of JSON, where the server listens."""
    _say({"url": url, "pid": os.getpid()})


def _say(line: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


async def _serve(settings: Settings, on_ready: Callable[[str], None] | None) -> None:
    stop = asyncio.Event()
    app = create_app(settings, report=lambda stage: _say({"stage": stage}) if settings.parent else None)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_PATIENCE)
    await runner.setup()
    try:
        server = await listen(runner, settings.host, settings.port)
        with contextlib.closing(server), _signals(stop), _parent_watched(settings.parent, stop):
            host, port = server.sockets[0].getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            _log.info("serving %s on %s", settings.home, url)
            (on_ready or announce)(url)
            await _first_of(stop, app[ROOMS].crashed)
    finally:
        await runner.cleanup()
        importing = ROOMS in app and app[ROOMS].warming.is_alive()
    crash = app[ROOMS].crash
    if crash is not None:
        raise crash
    if importing:
        logging.shutdown()
        os._exit(0)  # everything is closed, and an import that is still going on would hold the process up for seconds


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Generator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _parent_watched(parent: int | None, stop: asyncio.Event) -> Generator[None]:
    """Set ``stop`` when the parent ends, however it ends."""
    if parent is None:
        yield
        return
    loop = asyncio.get_running_loop()
    try:
        handle = os.pidfd_open(parent)
    except ProcessLookupError:
        stop.set()
        yield
        return
    except (AttributeError, OSError):  # not Linux, or an old kernel
        task = asyncio.create_task(_poll_parent(parent, stop), name="watch the parent")
        yield
        task.cancel()
        return
    if os.getppid() != parent:  # it ended before there was a handle to watch
        stop.set()
    loop.add_reader(handle, stop.set)
    try:
        yield
    finally:
        loop.remove_reader(handle)
        os.close(handle)


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _poll_parent(parent: int, stop: asyncio.Event) -> None:
    while os.getppid() == parent:  # noqa: ASYNC110 - no event tells of it on such a system
        await asyncio.sleep(_PARENT_POLL)
    stop.set()
