"""How the clients of the Loops surface end: by a call, or with the block that they were made for."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from tg_tinker.core.run import RunCore

__all__ = ["Closing"]


class Closing:
    """``close``, ``aclose``, and the blocks that end in them. The service, and with it the connection, stays open."""

    def __init__(self, core: RunCore) -> None:
        self._core = core

    @property
    def core(self) -> RunCore:
        """Where its calls go."""
        return self._core

    def close(self) -> None:
        """Refuse further calls, report what was never waited for, and finish the tracker, where there is one."""
        self._core.home.check_blocking("close()")
        self._core.home.run(self._core.aclose())

    async def aclose(self) -> None:
        """Close, from a coroutine."""
        await self._core.home.hop(self._core.aclose)

    close_async = aclose

    def __enter__(self) -> Self:
        """Itself; it is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    async def __aenter__(self) -> Self:
        """Itself; it is closed at the end of the block."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()
