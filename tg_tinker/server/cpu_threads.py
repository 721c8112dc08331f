"""How many CPU threads the device thread computes with: measured, because guessing is wrong both ways.

Small models are fastest on one thread, large ones on several, and on cores that others use two threads can be far
slower than one.
"""

from __future__ import annotations

import logging
import os
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tg_tinker.engine.models.base_model import BaseModel

_log = logging.getLogger("tg_tinker.server")

WORTH = 0.85  # more threads must bring the time down to this share of what fewer take
ROUNDS = 3
POSITIONS = 64
SMALL = 30_000_000  # parameters: below it one thread is best for decoding, and two collapse when others want the cores


class CpuThreads:
    """Sets the thread count of the calling thread, for the largest model that it has seen."""

    def __init__(self, fixed: int | None) -> None:
        """``fixed``, or else ``OMP_NUM_THREADS``, is taken as it is; otherwise each larger model is measured."""
        self._fixed = fixed if fixed is not None else _from_environment()
        self._largest = 0

    def prepare(self) -> None:
        """Before there is a model: what was asked for, else one."""
        import torch

        torch.set_num_threads(self._fixed or 1)

    def fit(self, base: BaseModel) -> None:
        """Choose for a model that was just loaded; on the device thread, which waits about a second."""
        size = base.model.num_parameters()
        if self._fixed is not None or base.device.type != "cpu" or size <= max(self._largest, SMALL):
            return
        import torch

        self._largest = size
        chosen, best = 1, float("inf")
        for count in _candidates():
            torch.set_num_threads(count)
            taken = _seconds(base)
            if taken < best * WORTH:
                chosen, best = count, taken
            elif taken > best:
                break
        torch.set_num_threads(chosen)
        _log.info("%s computes on %d of %d CPU threads", base.name, chosen, os.cpu_count() or 1)


def _candidates() -> list[int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({cores, *(count for count in (1, 2, 4, 8, 16, 32, 64) if count <= cores)})


def _seconds(base: BaseModel) -> float:
    """The fastest of a few passes over one short row."""
    import torch

    tokens = torch.zeros((1, min(POSITIONS, base.max_length)), dtype=torch.int64)
    taken: list[float] = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            begun = perf_counter()
            base.model(input_ids=tokens, use_cache=False)
            taken.append(perf_counter() - begun)
    return min(taken)


def _from_environment() -> int | None:
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else None
