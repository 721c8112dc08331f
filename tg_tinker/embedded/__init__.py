"""The server that ``ServiceClient()`` runs on this machine: one child per home, shared by the clients of this program.

It starts on first use, again after it has died, and ends with the last client that is closed, or with the program.
A forked child uses its parent's server and never ends it.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from tg_tinker import bridge
from tg_tinker.embedded.process import ServerProcess
from tg_tinker.errors import ClientClosedError, ServerRestartedError, TGTinkerError

__all__ = ["EmbeddedEndpoint", "server_of"]

Report = Callable[[str, str], None]

CLOSE_PATIENCE = 5.0  # seconds that a server may take to end when its last client is closed
EXIT_PATIENCE = 1.0  # and when the program ends
_DYING = 0.5  # a connection may break this long before its process is known to have ended
_RECENT = 5.0  # a broken connection is explained by a death this long ago, though another server runs already


class EmbeddedServer:
    """The server of one home: at most one process of this program at a time."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._lock = threading.Lock()
        self._process: ServerProcess | None = None
        self._leases: set[object] = set()
        self._last_death: tuple[float, ServerRestartedError] | None = None

    def __repr__(self) -> str:
        """The home, and the process that serves it."""
        return f"<EmbeddedServer {self.home}: {self._process}>"

    @property
    def process(self) -> ServerProcess | None:
        """The child, dead or alive; None before the first use."""
        return self._process

    def lease(self, holder: object) -> None:
        """Keep the server until ``release`` is called for the same holder."""
        with self._lock:
            self._leases.add(holder)

    def is_leased(self, holder: object) -> bool:
        """Whether a lease was taken and not given back; takes no lock, so that a finalizer may ask."""
        return holder in self._leases

    def release(self, holder: object, patience: float = CLOSE_PATIENCE) -> None:
        """Give a lease back; the server ends with the last one. Blocks until it has ended."""
        with self._lock:
            self._leases.discard(holder)
            process = None if self._leases else self._process
            if process is not None and process.owner == os.getpid():
                self._process = None
        if process is not None:
            process.stop(patience)

    def begin(self, report: Report) -> ServerProcess:
        """The process that serves, or the one that is starting now; blocks for no longer than starting it takes."""
        with self._lock:
            process = self._process
            if process is None or not process.usable():
                self._bury(process)
                report("server", f"starting a server on this machine (state in {self.home})")
                process = self._process = ServerProcess(self.home, report=report)
            return process

    def _bury(self, process: ServerProcess | None) -> None:
        death = process.death() if process is not None else None
        if death is not None:
            self._last_death = (monotonic(), death)

    async def serving(self, report: Report, timeout: float) -> ServerProcess:
        """The process, once it serves. Raises ``ServerUnreachableError`` after ``timeout`` seconds without."""
        process = self._process
        if process is None or not process.alive():
            process = await asyncio.to_thread(self.begin, report)
            began = monotonic()
            await process.ready.wait_async(timeout)
            process.check_ready(monotonic() - began)
            report("server", f"the server on this machine is ready at {process.url}")
        return process

    async def explain(self) -> TGTinkerError | None:
        """The end of the process, where that is why a connection broke just now."""
        process = self._process
        if process is not None:
            if process.owner == os.getpid():
                await process.ended.wait_async(_DYING)
            death = process.death()
            if death is not None:
                return death
        if self._last_death is not None and monotonic() - self._last_death[0] < _RECENT:
            return self._last_death[1]
        return None

    def stop(self, patience: float) -> None:
        """End the process, whoever still holds a lease."""
        process = self._process
        if process is not None:
            process.stop(patience)

    def after_fork(self) -> None:
        """Start afresh in a forked child, but for the parent's process, which serves the child too."""
        self._lock = threading.Lock()
        self._leases = set()


class EmbeddedEndpoint:
    """A ``ServiceClient``'s lease on the embedded server of a home (see ``core.endpoint``).

    It is given back at the latest when the endpoint is collected.
    """

    def __init__(self, home: Path, *, ready_timeout: float, report: Report) -> None:
        self._server = server_of(home)
        self._ready_timeout = ready_timeout
        self._report = report
        self._closed = False
        self._lease = object()
        self._finalizer = weakref.finalize(self, _let_go, self._server, self._lease)
        self._finalizer.atexit = False  # every server ends then

    def __repr__(self) -> str:
        """The server behind it."""
        return f"<EmbeddedEndpoint of {self._server}>"

    async def resolve(self) -> tuple[str, str | None]:
        """URL and key of the running server, which is started where none runs."""
        if self._closed:
            raise ClientClosedError("this client is closed: make a new ServiceClient")
        self._server.lease(self._lease)
        process = await self._server.serving(self._report, self._ready_timeout)
        return process.url, process.key

    async def explain(self, error: BaseException) -> TGTinkerError | None:  # noqa: ARG002 - the process says it all
        """How the server ended, where it has."""
        return await self._server.explain()

    async def aclose(self) -> None:
        """Give the lease back; with the last one the server ends."""
        self._closed = True
        self._finalizer.detach()
        await asyncio.to_thread(self._server.release, self._lease)


def _let_go(server: EmbeddedServer, lease: object) -> None:
    """Give a forgotten lease back: in a thread, for this runs wherever an endpoint is collected, and must not wait."""
    if server.is_leased(lease):
        threading.Thread(target=server.release, args=(lease,), name="tg-tinker-let-go", daemon=True).start()


_lock = threading.Lock()
_servers: dict[Path, EmbeddedServer] = {}


def server_of(home: Path) -> EmbeddedServer:
    """The one embedded server that this program has for ``home``; it may not have been started yet."""
    with _lock:
        return _servers.setdefault(home, EmbeddedServer(home))


def _at_exit() -> None:
    bridge.shutdown()  # first, so that nobody sees the connections break
    for server in list(_servers.values()):
        server.stop(EXIT_PATIENCE)


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a fork copies the process, and with it this one global
    _lock = threading.Lock()
    for server in _servers.values():
        server.after_fork()


# At import, so that it runs after the exit handlers of whoever imported us.
atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
