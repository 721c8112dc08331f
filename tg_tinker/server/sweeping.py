"""Takes away what was kept long enough: artifacts, results, versions of runs that have ended, models nothing uses.

Reading is what enforces a ttl (an expired artifact is not found); this gives disk and memory their space back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tg_tinker.server.rooms import Rooms

_log = logging.getLogger("tg_tinker.server")
EVERY = 60.0  # seconds


class Sweeping:
    """A task that sweeps every so often, from ``start`` to ``aclose``."""

    def __init__(self, rooms: Rooms, *, clock: Callable[[], datetime] | None = None) -> None:
        self._rooms = rooms
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
        """Sweep once; how many artifacts and how many results were past their time."""
        self._let_go_of_models()
        await self._clear_aside()
        now = self._clock()
        return await asyncio.to_thread(self._rooms.store.sweep, now), await self._rooms.database.sweep_futures(now)

    def _let_go_of_models(self) -> None:
        rooms = self._rooms
        rooms.samplers.rest(rooms.settings.idle)
        rooms.models.sweep([*(run.model for run in rooms.runs), *rooms.samplers.models()])

    async def _clear_aside(self) -> None:
        """Nobody is pinned to a version of a run that is gone, be it deleted or its server dead."""
        store = self._rooms.store
        for tenant, run_id in await asyncio.to_thread(store.runs_aside):
            if await self._rooms.registry.has_ended(tenant, run_id):
                await asyncio.to_thread(store.clear_aside, tenant, run_id)

    async def _run(self) -> None:
        while True:
            try:
                await self.sweep()
            # A full disk or a locked database passes; the next round tries again, and the log says what was wrong.
            except Exception:  # noqa: BLE001
                _log.exception("what is past its time could not be swept away")
            await asyncio.sleep(EVERY)
