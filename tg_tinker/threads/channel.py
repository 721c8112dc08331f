"""A bounded hand-over of chunks from a task at home to one consumer, in any thread or on any loop.

At most ``depth`` chunks wait in it; then the producer waits. Leaving early tells the producer to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tg_tinker.errors import ClientClosedError
from tg_tinker.failure import Failure
from tg_tinker.threads.latch import Latch

T = TypeVar("T")
DEPTH = 8


class Channel(Generic[T]):
    """One producer, one consumer; every method says who calls it."""

    def __init__(self, call_soon: Callable[..., object], *, depth: int = DEPTH) -> None:
        self._call_soon = call_soon
        self._depth = depth
        self._chunks: deque[T] = deque()
        self._arrival = Latch()
        self._credit = asyncio.Event()
        self._failure: Failure | None = None
        self._over = False
        self._stop: Callable[[], None] | None = None
        self._left = False
        self.opened = Latch()

    def __repr__(self) -> str:
        """Say how many chunks wait and whether more may come."""
        return f"<Channel {len(self._chunks)}/{self._depth}{' closed' if self._over or self._left else ''}>"

    # -------------------------------------------------------------------------- the producer, at home

    def open(self) -> None:
        """The source has been opened: whoever waits for that may go on."""
        self.opened.set()

    async def send(self, chunk: T) -> None:
        """Hand over one chunk; waits while the consumer is ``depth`` chunks behind."""
        while len(self._chunks) >= self._depth:
            self._credit.clear()
            await self._credit.wait()
        self._chunks.append(chunk)
        self._arrival.set()

    def finish(self, failure: Failure | None = None) -> None:
        """There is no more to come, because the source ended or failed; the second call does nothing."""
        if self._over:
            return
        self._failure = failure
        self._over = True
        self.opened.set()
        self._arrival.set()

    def on_leave(self, stop: Callable[[], None]) -> None:
        """Have ``stop`` called at home once the consumer leaves early (at once, if it has)."""
        self._stop = stop
        if self._left:
            stop()

    def _halt(self) -> None:
        if self._stop is not None:
            self._stop()

    # ----------------------------------------------------------------------- the consumer, anywhere

    def raise_refusal(self) -> None:
        """Raise the error that kept the source from opening."""
        if self._failure is not None and not self._chunks:
            raise self._failure.error()

    def receive(self) -> T:
        """Block for the next chunk. Raises ``EOFError`` at the end, and the source's error where it failed."""
        while not self._ready():
            self._arrival.wait()
        return self._take()

    async def receive_async(self) -> T:
        """Await the next chunk; otherwise as ``receive``."""
        while not self._ready():
            await self._arrival.wait_async()
        return self._take()

    def leave(self) -> None:
        """Want no more: the source is closed. Does not wait, so it may be called by the garbage collector."""
        self._left = True
        self._call_soon(self._halt)

    @property
    def exhausted(self) -> bool:
        """Whether the source has ended and everything has been taken."""
        return self._over and not self._chunks

    def _ready(self) -> bool:
        """Whether there is something to take; if not, arm the latch for what comes next."""
        if self._chunks or self._over or self._left:
            return True
        self._arrival = Latch()
        return bool(self._chunks) or self._over  # it may have come while the latch was changed

    def _take(self) -> T:
        if self._left:
            raise EOFError  # what was not read is dropped
        if not self._chunks:
            self.raise_refusal()
            raise EOFError
        chunk = self._chunks.popleft()
        if len(self._chunks) == self._depth - 1:
            self._call_soon(self._credit.set)
        return chunk


def drop(channel: Channel[Any]) -> None:
    """Leave a channel that may already be over, whatever has become of its home."""
    if not channel.exhausted:
        with contextlib.suppress(ClientClosedError):
            channel.leave()
