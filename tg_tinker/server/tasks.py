"""Work that must not be cut in the middle when a client goes away: a transaction, the end of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_running: set[asyncio.Task[Any]] = set()


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Do it to the end, even if whoever waits for it is cancelled."""
    task = asyncio.create_task(work)
    _running.add(task)  # the loop itself holds tasks weakly
    task.add_done_callback(_running.discard)
    return await asyncio.shield(task)
