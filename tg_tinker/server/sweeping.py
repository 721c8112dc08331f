"""Takes away what was kept long enough: artifacts past their ttl, results past their hour.

Reading is what enforces a ttl (an expired artifact is not found); this only gives the disk its space back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tg_tinker.store.checkpoints import CheckpointStore
    from tg_tinker.store.database import Database

_log = logging.getLogger("tg_tinker.server")
EVERY = 60.0  # seconds


class Sweeping:
    """A task that sweeps store and database every so often, from ``start`` to ``aclose``."""

    def __init__(
        self, store: CheckpointStore, database: Database, *, clock: Callable[[], datetime] | None = None
    ) -> None:
        self._store = store
        self._database = database
        self._clock = clock or (lambda: datetime.now(UTC))
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Sweep from now on."""
        self._task = asyncio.create_task(self._run(), name="tg-tinker-sweep")

    async def aclose(self) -> None:
        """Sweep no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def sweep(self) -> tuple[int, int]:
        """Sweep once; how many artifacts and how many results were taken away."""
        now = self._clock()
        return await asyncio.to_thread(self._store.sweep, now), await self._database.sweep_futures(now)

    async def _run(self) -> None:
        while True:
            try:
                await self.sweep()
            # A full disk or a locked database passes; the next round tries again, and the log says what was wrong.
            except Exception:  # noqa: BLE001
                _log.exception("what is past its time could not be swept away")
            await asyncio.sleep(EVERY)
