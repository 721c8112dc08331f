"""Choose how many CPU threads torch computes with, by measuring on the model itself.

More threads than a model can feed cost more than they give, and collapse when something else wants the cores.
"""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING

import torch

from tg_tinker.engine.forward import hidden_states
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from tg_tinker.engine.base_model import BaseModel

__all__ = ["VARIABLE", "tune_threads"]

VARIABLE = "TG_TINKER_THREADS"

_SMALL = 30_000_000  # parameters: below it one thread is best for decoding, and two gain little in training
_GAIN = 1.25  # how much faster more threads must be to be worth what they cost under contention
_SHAPE = (4, 16)  # rows and tokens of the measured forward pass
_ROUNDS = 3


def tune_threads(base: BaseModel) -> int:
    """Set torch's thread count to what suits ``base``, and give it; ``TG_TINKER_THREADS`` decides where it is set.

    Never more than torch was going to use, so OMP_NUM_THREADS is kept as the upper bound. Raises
    ``InvalidRequestError`` when the variable is not a positive integer.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is not None:
        threads = _checked(wanted)
    elif base.device.type != "cpu":
        return torch.get_num_threads()
    else:
        threads = 1 if base.model.num_parameters() < _SMALL else _fastest(base)
    torch.set_num_threads(threads)
    return threads


def _fastest(base: BaseModel) -> int:
    """Double the threads as long as that pays."""
    limit = torch.get_num_threads()
    best, best_time = 1, _seconds(base, 1, math.inf)
    threads = 2
    while threads <= limit:
        seconds = _seconds(base, threads, 2 * best_time)
        if seconds * _GAIN > best_time:
            break
        best, best_time = threads, seconds
        threads *= 2
    return best


@torch.no_grad()
def _seconds(base: BaseModel, threads: int, hopeless: float) -> float:
    """Time one forward pass, the best of a few, or of fewer once one has taken a ``hopeless`` time."""
    torch.set_num_threads(threads)
    tokens = torch.zeros(_SHAPE, dtype=torch.long, device=base.device)
    times: list[float] = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        hidden_states(base, tokens)
        times.append(time.perf_counter() - started)
        if times[-1] > hopeless:
            break
    return min(times)


def _checked(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        message = f"{VARIABLE} must be a positive integer, not {value!r}"
        raise InvalidRequestError(message, field=VARIABLE, constraint="a positive integer")
    return int(value)
