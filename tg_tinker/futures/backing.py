"""What a future needs of others: a home to run on, and a backer that works for it. Protocols only."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from tg_tinker.futures import OperationFuture

__all__ = ["Backer", "Home"]

T = TypeVar("T")


class Home(Protocol):
    """What a future needs of the place where its client lives (see ``bridge``)."""

    def call_soon(self, function: Callable[..., object], /, *args: Any) -> None:
        """Run ``function`` on the home's loop; any thread."""

    def check_blocking(self, what: str) -> None:
        """Raise where blocking this thread would deadlock; warn where it would stall another loop."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` at home and block until it is done."""
        ...

    async def hop(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run what ``start`` makes at home and await it from whatever loop this is."""
        ...


class Backer(Protocol):
    """Who works for a future: fetches its outcome and takes requests to cancel it. Called at home."""

    def wake(self, future: OperationFuture[Any], /) -> None:
        """Somebody wants the outcome: see to it that it is being fetched."""

    async def cancel(self, future: OperationFuture[Any], /) -> bool:
        """Ask for cancellation; return whether the operation will really not take effect."""
        ...
