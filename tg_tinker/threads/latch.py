"""A bit that flips once and wakes every thread and every event loop that waits for it.

The smallest thing that blocking and awaiting callers can share. It carries no value: whoever sets it has
stored the value before.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from math import inf
from time import monotonic

from tg_tinker.errors import TGTinkerError

# A wait without a timeout cannot be interrupted by Ctrl-C on Windows, so there it is cut into slices.
_SLICE = 0.1 if os.name == "nt" else threading.TIMEOUT_MAX


class Latch:
    """Unset until ``set`` is called, then set for good; any thread, any loop."""

    __slots__ = ("_lock", "_set", "_wakers")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._wakers: dict[object, Callable[[], None]] = {}

    def __repr__(self) -> str:
        """Say whether it is set and how many wait."""
        return f"<Latch {'set' if self._set else f'unset, {len(self._wakers)} waiting'}>"

    def is_set(self) -> bool:
        """Whether the bit has flipped."""
        return self._set

    def set(self) -> None:
        """Flip the bit and wake everybody; the second call does nothing."""
        with self._lock:
            self._set = True
            wakers, self._wakers = self._wakers, {}
        for wake in wakers.values():
            wake()

    def when_set(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have ``wake`` called by the thread that sets the bit (now, if it is set); return how to call that off."""
        key = object()
        with self._lock:
            waiting = not self._set
            if waiting:
                self._wakers[key] = wake
        if not waiting:
            wake()
        return lambda: self._forget(key)

    def _forget(self, key: object) -> None:
        with self._lock:
            self._wakers.pop(key, None)

    def wait(self, timeout: float | None = None) -> bool:
        """Block this thread until the bit is set or ``timeout`` seconds are over; return whether it is set."""
        if self._set:
            return True
        event = threading.Event()
        forget = self.when_set(event.set)
        try:
            _wait_in_slices(event, timeout)
        finally:
            forget()
        return self._set

    async def wait_async(self, timeout: float | None = None) -> bool:
        """Suspend this task until the bit is set or ``timeout`` seconds are over; return whether it is set."""
        if self._set:
            return True
        loop = running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        forget = self.when_set(lambda: _wake_on(loop, woken))
        timer = None if timeout is None else loop.call_later(timeout, _resolve, woken)
        try:
            await woken
        finally:
            forget()
            if timer is not None:
                timer.cancel()
        return self._set


def running_loop() -> asyncio.AbstractEventLoop:
    """The running asyncio loop; raises a clear error under trio and other event loops."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        message = "tg_tinker can be awaited under asyncio only; elsewhere use the blocking form in a worker thread"
        raise TGTinkerError(message, code="ASYNCIO_REQUIRED") from None


def _wait_in_slices(event: threading.Event, timeout: float | None) -> None:
    deadline = inf if timeout is None else monotonic() + timeout
    while not event.wait(min(_SLICE, max(0.0, deadline - monotonic()))):
        if monotonic() >= deadline:
            return


def _wake_on(loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(_resolve, woken)
    except RuntimeError:  # that loop has closed, and its waiters with it
        return


def _resolve(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
