"""Where the published versions of one run lie on disk, and which of them go when they take too much of it.

A version that its name has moved on from is put aside, for those who are pinned to it: until the run ends, or until
those aside are more than may be kept; then the ones that nobody asked for the longest go. Files are others' business.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from tg_tinker.store.checkpoints import ArtifactRecord


MOST = 1000  # versions of a run that are aside at most, however small they are


@attrs.frozen
class Stored:
    """The artifact behind a version; ``size`` in bytes."""

    artifact_id: str
    size: int
    expires_at: datetime | None

    @classmethod
    def of(cls, record: ArtifactRecord) -> Stored:
        """What has to be known of an artifact to serve it."""
        return cls(record.artifact_id, record.size_bytes, record.expires_at)

    @property
    def expired(self) -> bool:
        """Whether its time to live is over."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


class Shelf:
    """The stored versions of a run, by number; the event loop asks, and the threads that write tell."""

    def __init__(self, most_aside: int) -> None:
        self._most_aside = most_aside  # bytes
        self._lock = threading.Lock()
        self._stored: dict[int, Stored] = {}
        self._aside: OrderedDict[int, Stored] = OrderedDict()  # the one asked for last is last
        self._bytes_aside = 0

    def add(self, number: int, record: ArtifactRecord) -> None:
        """A version is durable."""
        with self._lock:
            self._stored[number] = Stored.of(record)

    def find(self, number: int) -> Stored | None:
        """The artifact of a version, if it is on disk; being asked for keeps it there longer than others."""
        with self._lock:
            if number in self._aside:
                self._aside.move_to_end(number)
            return self._stored.get(number)

    def put_aside(self, number: int) -> list[Stored]:
        """No name stands for this version any more. Gives those that there is no room for: they have to go."""
        with self._lock:
            if number in self._stored:
                self._aside[number] = self._stored[number]
                self._bytes_aside += self._stored[number].size
            gone: list[Stored] = []
            while self._bytes_aside > self._most_aside or len(self._aside) > MOST:
                gone.append(self._take(next(iter(self._aside))))
            return gone

    def forget(self, number: int) -> None:
        """A version was deleted, or has expired."""
        with self._lock:
            if number in self._aside:
                self._take(number)
            self._stored.pop(number, None)

    def _take(self, number: int) -> Stored:
        stored = self._aside.pop(number)
        self._bytes_aside -= stored.size
        del self._stored[number]
        return stored
