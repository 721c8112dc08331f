"""Published sampler versions of one run: immutable, strictly increasing, the newest few kept in memory.

Kept longer are those that somebody used lately (a pinned client). What leaves memory is read back from the ``shelf`` by
``published``. Lives on the event loop; waiting for a version is an event.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from time import monotonic
from typing import TYPE_CHECKING

import attrs

from tg_tinker.server.weights.shelf import Shelf

if TYPE_CHECKING:
    from tg_tinker.engine.lora.adapters import FrozenAdapter

LEASE = 600.0  # seconds that a use keeps a version
LEASES = 16  # at most so many are kept for having been used


@attrs.frozen(eq=False)
class Version:
    """One published adapter; ``bumped`` ones take over from checkpoints that are sampled from until then."""

    number: int
    name: str
    adapter: FrozenAdapter = attrs.field(repr=False)
    bumped: bool = False


class Versions:
    """What the run's sampler can serve from memory."""

    def __init__(self, kept: int, most_aside: int) -> None:
        """Keep so many versions in memory, and so many bytes of those on disk that names have moved on from."""
        self.shelf = Shelf(most_aside)
        self._kept = kept
        self._versions: OrderedDict[int, Version] = OrderedDict()
        self._leases: OrderedDict[int, float] = OrderedDict()
        self._published = asyncio.Event()
        self._closed = False
        self.newest = 0
        self.bumped = 0

    def __len__(self) -> int:
        """How many are in memory."""
        return len(self._versions)

    def add(self, version: Version) -> None:
        """Serve a version from now on, wake those who wait for it, and drop what is no longer kept."""
        self._versions[version.number] = version
        self.newest = max(self.newest, version.number)
        if version.bumped:
            self.bumped = max(self.bumped, version.number)
        self._drop()
        self._published.set()
        self._published = asyncio.Event()

    def get(self, number: int) -> Version | None:
        """A version that is in memory; being used keeps it there for a while."""
        version = self._versions.get(number)
        if version is not None:
            self._leases[number] = monotonic()
            self._leases.move_to_end(number)
        return version

    def forget(self, number: int) -> None:
        """Serve a version no more: its artifact was deleted, or has expired."""
        self._versions.pop(number, None)
        self._leases.pop(number, None)
        self.shelf.forget(number)

    def withdraw(self, number: int) -> None:
        """A version could not be written, and its publish has failed: the newest is the one before it again."""
        self.forget(number)
        self.newest = max(self._versions, default=0)
        self.bumped = max((version.number for version in self._versions.values() if version.bumped), default=0)

    async def reached(self, minimum: int, seconds: float) -> bool:
        """Wait until a version of at least ``minimum`` is served; say whether it came within ``seconds``."""
        deadline = monotonic() + seconds
        while self.newest < minimum and not self._closed:
            try:
                await asyncio.wait_for(self._published.wait(), max(0.0, deadline - monotonic()))
            except TimeoutError:
                return self.newest >= minimum
        return self.newest >= minimum

    def close(self) -> None:
        """Wake everybody who waits: nothing more will be published."""
        self._closed = True
        self._published.set()

    def _drop(self) -> None:
        horizon = monotonic() - LEASE
        while self._leases and (len(self._leases) > LEASES or next(iter(self._leases.values())) < horizon):
            self._leases.popitem(last=False)
        for number in list(self._versions)[: -self._kept]:
            if number not in self._leases:
                del self._versions[number]
