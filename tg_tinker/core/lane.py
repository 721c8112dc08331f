"""The order of one run's submits: first called, first accepted by the server, across threads and loops.

A place is taken by the call itself, in the caller's thread. Waiting one's turn and leaving happen at home.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from tg_tinker.threads.latch import Latch

__all__ = ["Lane", "Place"]


class Lane:
    """A queue in which each place knows only the one ahead of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tail: Place | None = None
        self._taken = 0
        self.missing: list[tuple[int, str]] = []  # gradients that will not come: their places and names

    def __repr__(self) -> str:
        """Say how many places were taken and whether anybody is in line."""
        busy = self._tail is not None and not self._tail.left.is_set()
        return f"<Lane {self._taken} taken{', busy' if busy else ''}>"

    def take(self) -> Place:
        """Take the next place; any thread, never waits."""
        with self._lock:
            if self._tail is None or self._tail.left.is_set():
                self.missing = []  # nobody is in line who could be waiting behind one of them
            self._taken += 1
            self._tail = Place(self, self._tail, self._taken)
            return self._tail


class Place:
    """A place in line: ``async with place`` waits for those ahead and leaves at the end, whatever happens."""

    __slots__ = ("_ahead", "_given_up", "_known", "_lane", "left", "number")

    def __init__(self, lane: Lane, ahead: Place | None, number: int) -> None:
        self._lane = lane
        self._ahead = ahead
        self._known = len(lane.missing)
        self._given_up = False
        self.number = number
        self.left = Latch()

    @property
    def spoiler(self) -> str | None:
        """Name a gradient ahead of this place that will not come, which was not known when the place was taken."""
        later = self._lane.missing[self._known :]
        return next((name for number, name in later if number < self.number), None)

    def refuse(self, name: str) -> None:
        """Note that the gradient of this place, called ``name``, will not come."""
        self._lane.missing.append((self.number, name))

    async def turn(self) -> None:
        """Wait until every place ahead has been left; a wait that is cancelled leaves no hole."""
        try:
            if self._ahead is not None:
                await self._ahead.left.wait_async()
        except BaseException:
            self.leave()
            raise
        self._ahead = None

    async def __aenter__(self) -> Self:
        """Wait for one's turn."""
        await self.turn()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the next one go."""
        self.leave()

    def leave(self) -> None:
        """Give the place up; whoever is behind goes on waiting for those who are ahead."""
        if self._given_up:
            return
        self._given_up = True
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            self.left.set()
        else:
            ahead.left.when_set(self.left.set)
