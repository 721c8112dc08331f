"""What every client of one ``ServiceClient`` shares: the home, the connection, and whether it is still open."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
import weakref
from typing import TYPE_CHECKING

from tg_tinker.bridge import Home
from tg_tinker.core.transport import Connection
from tg_tinker.errors import ClientClosedError
from tg_tinker.threads.caller import user_site

if TYPE_CHECKING:
    from tg_tinker.core.run import RunCore

__all__ = ["ServiceCore"]


class ServiceCore:
    """Owner of one connection; the runs and samplers made from it are light views."""

    def __init__(self, home: Home, connection: Connection) -> None:
        self.home = home
        self.connection = connection
        self.runs: weakref.WeakSet[RunCore] = weakref.WeakSet()
        self._finalizer = weakref.finalize(self, _forgotten, home, connection, user_site())
        self._finalizer.atexit = False  # at exit the bridge closes what is open, silently

    @property
    def closed(self) -> bool:
        """Whether ``aclose`` was called."""
        return self.connection.closed

    def check_open(self) -> None:
        """Raise ``ClientClosedError`` after close."""
        if self.closed:
            raise ClientClosedError("this service client is closed; make a new one")

    async def aclose(self) -> None:
        """Close every run, then the connection; runs at home, and a second call does nothing."""
        self._finalizer.detach()
        await asyncio.gather(*(run.aclose() for run in list(self.runs)))
        await self.connection.aclose()


def _forgotten(home: Home, connection: Connection, site: str) -> None:
    """The last client is gone and nobody closed it: say so, and close what it left open."""
    if not connection.is_open():
        return
    with contextlib.suppress(ClientClosedError):
        home.spawn(connection.aclose())
    warnings.warn(f"unclosed ServiceClient, made at {site}: call close(), or use 'with'", ResourceWarning, stacklevel=2)
