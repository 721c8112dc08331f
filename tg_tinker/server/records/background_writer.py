"""Writes rows to the database in the background: in order, many at a time, and no row holds up the rest for ever.

What a row is, and what stands in for one that cannot be written, is said by ``journal`` and ``auditing``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import islice
from typing import Generic, TypeAlias, TypeVar

import attrs

from tg_tinker.errors import ServerError

_log = logging.getLogger("tg_tinker.server")
_BATCH = 500  # rows of one transaction
_LINGER = 0.1  # seconds that a write waits for more: the next operation, which goes first, is often just arriving
_RETRY = 5.0  # seconds until rows that could not be written are tried again
_PATIENCE = 20.0  # seconds that somebody waits for a row to be written

T = TypeVar("T")


@attrs.frozen(eq=False)
class _Row(Generic[T]):
    number: int
    content: T


_Batch: TypeAlias = list[tuple[Hashable, _Row[T]]]


class BackgroundWriter(Generic[T]):
    """Rows wait under a key; one that is put again before it was written takes the place of the first.

    ``write`` takes rows, all or none; ``give_up`` is called with a row that cannot be written, and why.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[T]], Awaitable[None]],
        give_up: Callable[[T, Exception], Awaitable[None]],
        *,
        linger: float = _LINGER,
        patience: float = _PATIENCE,
    ) -> None:
        self._name = name
        self._write = write
        self._give_up = give_up
        self._linger = linger
        self._patience = patience
        self._waiting: dict[Hashable, _Row[T]] = {}  # by rising number
        self._number = 0
        self._changed = asyncio.Event()
        self._hurry = asyncio.Event()
        self._closing = asyncio.Event()
        self._progress = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin writing."""
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def aclose(self) -> bool:
        """Write what is left; whether nothing was lost."""
        for event in (self._closing, self._hurry, self._changed):
            event.set()
        if self._task is not None:
            await self._task
        return not self._waiting

    def put(self, key: Hashable, content: T) -> None:
        """Write this soon."""
        known = self._waiting.get(key)
        if known is None:
            self._number += 1
        self._waiting[key] = _Row(self._number if known is None else known.number, content)
        self._changed.set()

    async def flush(self) -> None:
        """Wait until everything that was put so far is written, or given up.

        Raises ``ServerError`` (code RECORDS_NOT_WRITTEN) where that takes too long.
        """
        last = self._number
        self._hurry.set()
        try:
            async with asyncio.timeout(self._patience):
                while self._waiting and next(iter(self._waiting.values())).number <= last:
                    await self._progress.wait()
        except TimeoutError:
            message = f"{self._name} could not be written within {self._patience:g} s; the server's log says why"
            raise ServerError(message, code="RECORDS_NOT_WRITTEN") from None

    async def _run(self) -> None:
        while self._waiting or not self._closing.is_set():
            await self._gather()
            if await self._write_all():
                continue
            if self._closing.is_set():
                _log.critical("%s: %d rows were not written, and the server ends", self._name, len(self._waiting))
                return
            await _heard(self._closing, _RETRY)

    async def _gather(self) -> None:
        """Wait for the first row, and then a moment for those that often follow it."""
        while not self._waiting and not self._closing.is_set():
            self._changed.clear()
            await self._changed.wait()
        await _heard(self._hurry, self._linger)
        if not self._closing.is_set():
            self._hurry.clear()

    async def _write_all(self) -> bool:
        """Write whatever waits; False where that has to be tried again later."""
        while self._waiting:
            if not await self._write_batch(list(islice(self._waiting.items(), _BATCH))):
                return False
        return True

    async def _write_batch(self, batch: _Batch[T]) -> bool:
        from tg_tinker.store.database import is_passing

        try:
            await self._write([row.content for _, row in batch])
        # A row may be unwritable in any way; the others are written all the same.
        except Exception as error:  # noqa: BLE001
            if is_passing(error):
                _log.error("%s cannot be written; trying again in %s s", self._name, _RETRY, exc_info=error)
                return False
            if not await self._split(batch, error):
                return False
        self._forget(batch)
        return True

    async def _split(self, batch: _Batch[T], error: Exception) -> bool:
        """Find the row that spoils a batch, and do without it; False where the rest has to wait."""
        if len(batch) == 1:
            return await self._do_without(batch[0][1], error)
        middle = len(batch) // 2
        return await self._write_batch(batch[:middle]) and await self._write_batch(batch[middle:])

    async def _do_without(self, row: _Row[T], error: Exception) -> bool:
        from tg_tinker.store.database import is_passing

        _log.error("%s: a row cannot be written, now or later", self._name, exc_info=error)
        try:
            await self._give_up(row.content, error)
        # What stands in for the row may be as bad as the row; that must not keep the others waiting either.
        except Exception as second:  # noqa: BLE001
            if is_passing(second):
                return False
            _log.critical("%s: nothing can be written in the place of a row", self._name, exc_info=second)
        return True

    def _forget(self, batch: _Batch[T]) -> None:
        for key, row in batch:
            if self._waiting.get(key) is row:  # else it was put again meanwhile
                del self._waiting[key]
        self._progress.set()
        self._progress = asyncio.Event()


async def _heard(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, ``seconds`` at most."""
    if not event.is_set() and seconds > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)
