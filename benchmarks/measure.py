"""How things are measured on a machine that is never quiet: sides take turns, A B A B, and each turn is kept.

A turn returns what it measured. The first turn of each side warms up and is thrown away.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter, process_time
from typing import Any, Self

import attrs

TURN_LIMIT = 600.0  # seconds


class NotHereError(Exception):
    """A row cannot be measured here; the text says what is missing."""


@attrs.frozen
class Options:
    """How thorough to be; ``threads`` is what torch computes with on both sides."""

    quick: bool = False
    threads: int = 1
    rounds_at_most: int = 99

    def rounds(self, full: int) -> int:
        """How many times each side takes its turn."""
        return 2 if self.quick else min(full, self.rounds_at_most)


@attrs.frozen
class Cost:
    """What one piece of work took: seconds on the clock, and seconds of this process's CPU time."""

    wall: float
    cpu: float


def cost(work: Callable[[], object]) -> Cost:
    """Do the work once and say what it took."""
    wall, cpu = perf_counter(), process_time()
    work()
    return Cost(perf_counter() - wall, process_time() - cpu)


async def cost_async(work: Callable[[], Awaitable[object]]) -> Cost:
    """The same for a coroutine."""
    wall, cpu = perf_counter(), process_time()
    await work()
    return Cost(perf_counter() - wall, process_time() - cpu)


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1) -> dict[str, list[Any]]:
    """Let every side take its turn, ``rounds`` times over, after ``warm_up`` rounds that do not count."""
    taken: dict[str, list[Any]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, side in sides.items():
            value = side()
            if turn >= warm_up:
                taken[name].append(value)
    return taken


def child(module: str, *arguments: object, threads: int = 1) -> Any:
    """Run ``python -m module arguments`` in a process of its own; give the JSON of the last line that it prints."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment(threads), timeout=TURN_LIMIT
    )
    return json.loads(done.stdout.splitlines()[-1])


def environment(threads: int = 1) -> dict[str, str]:
    """The environment of a process that computes with ``threads`` threads and asks nothing of the network."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Heartbeat:
    """The longest time that the running loop did nothing else, in seconds: ``async with Heartbeat() as beat``."""

    def __init__(self, interval: float = 0.001) -> None:
        self.stall = 0.0
        self._interval = interval
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to listen."""
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0.01)
        self.stall = 0.0
        return self

    async def __aexit__(self, *_: object) -> None:
        """End, after one more beat, so that a stall just before the end counts too."""
        assert self._task is not None
        await asyncio.sleep(2 * self._interval)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            before = perf_counter()
            await asyncio.sleep(self._interval)
            self.stall = max(self.stall, perf_counter() - before - self._interval)
