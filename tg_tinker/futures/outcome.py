"""The state behind a future: pending, then settled once; who waits for it, and until when. Any thread.

It neither blocks nor fetches anything: ``futures`` waits on it, and a backer settles it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from math import inf
from time import monotonic
from typing import Any, Generic, TypeVar

from tg_tinker.failure import Failure
from tg_tinker.threads.latch import Latch

__all__ = ["Outcome", "Round"]

R = TypeVar("R")


class Round:
    """The waits between two disturbances: they end together, by the outcome or by ``failure``."""

    __slots__ = ("failure", "latch")

    def __init__(self) -> None:
        self.latch = Latch()
        self.failure: Failure | None = None


class Outcome(Generic[R]):
    """A value or a failure that is not there yet."""

    def __init__(self) -> None:
        self.settled = False
        self.status = "pending"
        self.value: R | None = None
        self.failure: Failure | None = None
        self.watched = False  # whether anybody ever showed interest
        self.glance = False  # somebody looked without waiting: worth one poll
        self.tracked = False  # to be fetched whether or not anybody waits
        self._lock = threading.Lock()
        self._round = Round()
        self._deadlines: dict[object, float] = {}
        self._callbacks: list[Callable[[], object]] = []

    @contextmanager
    def waiting(self, seconds: float | None) -> Generator[Round, None, None]:
        """Be counted among those who wait, so that whoever fetches knows for how long it is worth it."""
        key = object()
        self.watched = True
        self.glance = self.glance or seconds == 0
        with self._lock:
            current = self._round
            self._deadlines[key] = inf if seconds is None else monotonic() + seconds
        try:
            yield current
        finally:
            with self._lock:
                self._deadlines.pop(key, None)

    def call_when_settled(self, callback: Callable[[], object]) -> bool:
        """Have ``callback`` called by whoever settles; False where that has happened already."""
        self.watched = True
        with self._lock:
            if not self.settled:
                self._callbacks.append(callback)
            return not self.settled

    def is_wanted(self) -> bool:
        """Whether it is open and somebody wants it now."""
        return not self.settled and bool(self.glance or self.tracked or self._deadlines or self._callbacks)

    def wanted_until(self) -> float:
        """The latest monotonic time until which somebody wants it; ``-inf`` when nobody does. Uses up a glance."""
        with self._lock:
            glance, self.glance = self.glance, False
            if self.settled:
                return -inf
            if glance or self.tracked or self._callbacks:
                return inf
            return max(self._deadlines.values(), default=-inf)

    def progress(self, status: str) -> None:
        """It is known to be "pending" or "running"."""
        with self._lock:
            if not self.settled:
                self.status = status

    def disturb(self, failure: Failure) -> None:
        """End the waits of this moment with ``failure``, leaving the outcome open."""
        with self._lock:
            current, self._round = self._round, Round()
            self._deadlines.clear()
        current.failure = failure
        current.latch.set()

    def settle(self, status: str, value: R | None, failure: Failure | None = None) -> bool:
        """Fix the outcome and wake everybody; False, and no change, where it was fixed before."""
        with self._lock:
            if self.settled:
                return False
            self.value, self.failure, self.status = value, failure, status
            self.settled = True
            callbacks, self._callbacks = self._callbacks, []
        self._round.latch.set()
        for callback in callbacks:
            callback()
        return True

    def ended(self, current: Round, *, raises: Any = True) -> bool:
        """Whether it is settled, after a wait in round ``current``; raises what disturbed that round."""
        if not self.settled and raises and current.failure is not None:
            raise current.failure.error()
        return self.settled
