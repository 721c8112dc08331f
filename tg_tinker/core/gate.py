"""Lets a burst of requests onto the wire a few at a time, so that it reuses connections instead of opening one each.

A request holds its slot until it is answered, but never for long: against a server that takes its time, the burst is
out in a moment all the same. It bounds how fast connections are opened, not how many there are.
"""

from __future__ import annotations

import asyncio

__all__ = ["Gate"]

WIDTH = 64  # requests let through at once
PATIENCE = 0.01  # seconds after which a request that is still unanswered makes room for the next


class Gate:
    """``async with gate.slot()`` around a request; made and used on one loop."""

    def __init__(self, width: int = WIDTH) -> None:
        self._slots = asyncio.Semaphore(width)

    def slot(self) -> _Slot:
        """A place among those that are let through."""
        return _Slot(self._slots)


class _Slot:
    __slots__ = ("_slots", "_timer")

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        """Wait to be let through."""
        await self._slots.acquire()
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._leave)

    async def __aexit__(self, *_: object) -> None:
        """Make room, unless that was done."""
        if self._timer is not None:
            self._timer.cancel()
            self._leave()

    def _leave(self) -> None:
        self._timer = None
        self._slots.release()
