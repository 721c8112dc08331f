"""What a ``ServiceClient`` is before it offers anything: settings, a home, one connection, and an end to all of it.

Nothing is opened before the first call: that call decides whether the client lives on the shared loop thread, or,
inside ``async with``, on the caller's loop.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import ClassVar, NoReturn, Self

from tg_tinker import settings
from tg_tinker.bridge import Home, LoopHome, ThreadHome
from tg_tinker.core.endpoint import Endpoint, FixedEndpoint
from tg_tinker.core.retrieval import TGRetrieval
from tg_tinker.core.run import RunCore
from tg_tinker.core.service import ServiceCore
from tg_tinker.core.transport import Connection, RetryPolicy
from tg_tinker.embedded import EmbeddedEndpoint
from tg_tinker.errors import ClientClosedError
from tg_tinker.service.evidence import Evidence
from tg_tinker.service.keywords import suggesting
from tg_tinker.service.tenant import Tenant
from tg_tinker.settings import Settings
from tg_tinker.tokenizer import Tokenizers
from tg_tinker.types import checks
from tg_tinker.wire import codec

__all__ = ["Progress", "ServiceBase"]

#: Called with a stage ("server", "download", "load", "ready") and a line of text about it.
Progress = Callable[[str, str], object]

_logger = logging.getLogger("tg_tinker.service")


class ServiceBase:
    """Settings, home and connection of a ``ServiceClient``."""

    _names: ClassVar[settings.Names] = settings.NAMES

    @suggesting
    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        tenant_id: str | None = None,
        timeout: float = settings.TIMEOUT,
        retry_count: int = settings.RETRY_COUNT,
        ready_timeout: float = 600.0,
        verify_ssl: bool | None = None,
        home: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._settings = settings.resolve(
            api_key,
            base_url,
            tenant_id=tenant_id,
            timeout=timeout,
            retry_count=retry_count,
            ready_timeout=ready_timeout,
            verify_ssl=verify_ssl,
            home=home,
            names=self._names,
        )
        if progress is not None and not callable(progress):
            raise checks.refuse("progress", "a function of a stage and a line of text", progress)
        self._progress = progress
        self._lock = threading.Lock()
        self._core: RunCore | None = None
        self._endpoint: Endpoint | None = None
        self._closed = False
        self._tenant = Tenant(self._settings.tenant_id)
        self._tokenizers = Tokenizers(self._settings.home)
        self._evidence = Evidence()

    def __repr__(self) -> str:
        """Where it goes; never the key."""
        where = self._settings.base_url or f"a server on this machine, {self._settings.home}"
        return f"<{type(self).__name__} of {where}{' closed' if self._closed else ''}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, and say what to do instead."""
        raise TypeError("a ServiceClient cannot be pickled: make one over there, with the same base_url or home")

    # ------------------------------------------------------------------------------------------ what it is

    @property
    def core(self) -> RunCore:
        """Where calls go; made on first use, on the shared loop thread unless ``async with`` came first."""
        return self._core or self._settle(ThreadHome)

    @property
    def config(self) -> Settings:
        """What it goes by: URL, limits, home folder."""
        return self._settings

    @property
    def tenant_id(self) -> str | None:
        """The tenant it works for: as given, or as a server's answer has told; None before the first answer."""
        return self._tenant.name

    def _settle(self, kind: Callable[[], Home]) -> RunCore:
        with self._lock:
            if self._closed:
                raise ClientClosedError("this service client is closed; make a new one")
            if self._core is None:
                self._endpoint = self._find_server()
                self._core = RunCore(ServiceCore(home := kind(), self._connect(self._endpoint, home)), TGRetrieval())
            return self._core

    def _find_server(self) -> Endpoint:
        given = self._settings
        if given.base_url is not None:
            return FixedEndpoint(given.base_url, given.api_key)
        return EmbeddedEndpoint(given.home, ready_timeout=given.ready_timeout, report=_weakly(self._report))

    def _connect(self, endpoint: Endpoint, home: Home) -> Connection:
        return Connection(
            endpoint,
            home,
            policy=RetryPolicy(count=self._settings.retry_count),
            verify_ssl=self._settings.verify_ssl,
            timeout=self._settings.timeout,
            headers={"User-Agent": f"tg-tinker/{importlib.metadata.version('tg-tinker')}"},
            hear=partial(_tell, (self._evidence, self._tenant)),  # not this client: nothing may keep it
        )

    def _report(self, stage: str, text: str) -> None:
        """Log how far a creation is, and tell whoever asked to be told."""
        _logger.info("%s: %s", stage, text)
        if self._progress is not None:
            try:
                self._progress(stage, text)
            except Exception:  # a display may fail in any way, but not the creation that it shows
                _logger.exception("the progress function %r failed", self._progress)

    # -------------------------------------------------------------------------------------------- its end

    def close(self) -> None:
        """Close what was made from this client, and the connection; with its last client an embedded server ends."""
        core = self._core
        if core is not None:
            core.home.check_blocking("close()")
            core.home.run(self._end(core))
        self._closed = True

    async def aclose(self) -> None:
        """Close, from a coroutine; otherwise as ``close``."""
        core = self._core
        if core is not None:
            await core.home.hop(partial(self._end, core))
        self._closed = True

    close_async = aclose

    async def _end(self, core: RunCore) -> None:
        await core.service.aclose()
        if isinstance(self._endpoint, EmbeddedEndpoint):
            await self._endpoint.aclose()

    def __enter__(self) -> Self:
        """Itself; the connection is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    async def __aenter__(self) -> Self:
        """Live on the running loop, unless something was called before; the loop thread is not started for it."""
        await asyncio.to_thread(_preload)
        if self._core is None:
            self._settle(LoopHome)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()


def _tell(listeners: Iterable[Evidence | Tenant], answered: Mapping[str, str]) -> None:
    for listener in listeners:
        listener.hear(answered)


def _weakly(report: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """A method that does not keep its object: a server outlives the client that started it."""
    method = weakref.WeakMethod(report)

    def told(stage: str, text: str) -> None:
        found = method()
        if found is not None:
            found(stage, text)

    return told


def _preload() -> None:
    """Load what the first call needs, and takes noticeable time to load, away from the caller's loop."""
    importlib.import_module("aiohttp")
    codec.dumps({})
