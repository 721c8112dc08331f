"""One daemon thread that runs one event loop until it is stopped, and leaves nothing behind.

It hosts guests (open sessions) that are closed with it. ``bridge`` decides when there is one and what runs on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Guest", "LoopThread"]

STOP_BUDGET = 2.0  # seconds that the end of the process waits for the thread
_CANCEL_BUDGET = 1.0  # of these, for cancelled tasks
_CLOSE_BUDGET = 0.5  # and for open sessions
_logger = logging.getLogger("tg_tinker.bridge")


class Guest(Protocol):
    """Something open on the loop that must be closed there, at the latest when the loop ends."""

    async def disconnect(self) -> None:
        """Close it."""

    def abandon(self) -> None:
        """Forget it, in a forked child, without touching what the parent still uses."""


class LoopThread:
    """The thread ``tg-tinker-loop`` and its loop; it begins once ``before``, the one that it replaces, has ended."""

    def __init__(self, before: LoopThread | None = None) -> None:
        self._before = before
        self.loop = asyncio.new_event_loop()
        self.ended = False
        self.guests: set[Guest] = set()
        self._lock = threading.RLock()  # re-entrant: a finalizer may call us while we allocate
        self._thread = threading.Thread(target=self._main, name="tg-tinker-loop", daemon=True)

    def start(self) -> None:
        """Start the thread, with an empty context: it outlives the call that happened to need it first."""
        contextvars.Context().run(self._thread.start)

    def call_soon(self, function: Callable[..., object], /, *args: Any) -> bool:
        """Run ``function`` on the loop; False where the loop has ended. Any thread."""
        if threading.current_thread() is self._thread:
            self.loop.call_soon(function, *args)
            return True
        with self._lock:
            if not self.ended:
                self.loop.call_soon_threadsafe(function, *args)
            return not self.ended

    def stop(self) -> None:
        """Cancel the tasks, close the guests, and wait for the thread, but not for long; never raises."""
        self.call_soon(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_BUDGET)

    def abandon(self) -> None:
        """Mark everything here as belonging to another process, touching nothing that is shared with it."""
        self.ended = True
        for guest in self.guests:
            guest.abandon()

    def _main(self) -> None:
        if self._before is not None:  # what is still being closed there must not be opened here meanwhile
            self._before._thread.join(STOP_BUDGET)
            self._before = None
        try:
            self.loop.run_forever()
        except BaseException:  # even SystemExit must not leave those who wait without an answer
            _logger.exception("the loop thread was ended by an exception; the next call starts another")
        finally:
            with self._lock:
                self.ended = True
            with contextlib.suppress(Exception):  # at the end of a process nothing here may be reported
                self.loop.run_until_complete(self._drain())
            self.loop.close()

    async def _drain(self) -> None:
        me = asyncio.current_task()
        for _ in range(3):  # a cancelled task may start another that cleans up
            await asyncio.sleep(0)
            tasks = asyncio.all_tasks() - {me}
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_CANCEL_BUDGET / 3)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_BUDGET):
                await asyncio.gather(*(guest.disconnect() for guest in list(self.guests)), return_exceptions=True)
        self.guests.clear()
        await asyncio.sleep(0)  # closed transports say so one turn later
        await self.loop.shutdown_asyncgens()
