"""What one optimizer step is told: the optimizer and its numbers, clipping, and the schedule of the learning rate.

Every field is checked here, so whoever reads them may trust them. The step itself is in ``optim``, the learning rate of
a step in ``schedules``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

from tg_tinker.engine.requirements import require
from tg_tinker.types.config import OPTIMIZERS, SCHEDULES

__all__ = ["CYCLES", "OptimizerSettings"]

CYCLES = {"cosine": 0.5, "cosine_with_restarts": 1.0}  # the default ``num_cycles`` of each schedule that has one


@attrs.frozen(kw_only=True)
class OptimizerSettings:
    """Everything that one optimizer step needs to know."""

    name: str = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled for adamw, added to the gradient for adam and sgd
    grad_clip_norm: float | None = None  # None or 0: off
    momentum: float = 0.0  # sgd only
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    schedule_kwargs: Mapping[str, Any] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        """Refuse a value out of range with an ``InvalidRequestError`` that names the field."""
        require(self.name in OPTIMIZERS, "name", f"one of {', '.join(OPTIMIZERS)}", self.name)
        require(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self.schedule)
        for field in ("learning_rate", "eps", "weight_decay", "momentum", "warmup_steps"):
            require(_is_amount(getattr(self, field)), field, "a finite number of at least 0", getattr(self, field))
        for field in ("grad_clip_norm", "total_steps"):
            value = getattr(self, field)
            require(value is None or _is_amount(value), field, "a finite number of at least 0, or None", value)
        rates = all(0.0 <= beta < 1.0 for beta in self.betas)
        require(rates, "betas", "two numbers from 0 up to, not including, 1", self.betas)
        allowed = {"num_cycles"} if self.schedule in CYCLES else set[str]()
        unknown = sorted(set(self.schedule_kwargs) - allowed)
        require(not unknown, "schedule_kwargs", f"only {', '.join(allowed) or 'nothing'} for this schedule", unknown)
        cycles = self.schedule_kwargs.get("num_cycles", 1)
        require(_is_amount(cycles), "schedule_kwargs.num_cycles", "a finite number of at least 0", cycles)


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
