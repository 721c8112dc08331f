"""The learning rate of each step: constant, linear, cosine, cosine with restarts, each after a linear warm-up.

The factors are those of transformers' ``get_scheduler``, as a pure function of the step, so nothing has to be saved.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tg_tinker.engine.training.optimizer_settings import CYCLES
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from tg_tinker.engine.training.optimizer_settings import OptimizerSettings

__all__ = ["learning_rate_at"]


def learning_rate_at(settings: OptimizerSettings, step: int) -> float:
    """Give the learning rate of the step that comes after ``step`` finished ones.

    Raises ``InvalidRequestError`` when a decaying schedule has no ``total_steps``.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * step / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    if settings.total_steps is None:
        message = f"the {settings.schedule} schedule needs the total number of steps (max_steps)"
        raise InvalidRequestError(message, field="total_steps", constraint="a positive integer")
    decay = max(1, settings.total_steps - warmup)
    if settings.schedule == "linear":
        return settings.learning_rate * max(0.0, (settings.total_steps - step) / decay)
    return settings.learning_rate * _cosine(settings, (step - warmup) / decay)


def _cosine(settings: OptimizerSettings, progress: float) -> float:
    """Half cosine waves over ``progress`` from 0 to 1 (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    cycles = float(settings.schedule_kwargs.get("num_cycles", CYCLES[settings.schedule]))
    if settings.schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress)))
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (cycles * progress % 1.0))))
