"""A run's privacy parameters, completed from ``DPConfig`` and checked. Not for what they cost (``accountant``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy.accountant import Mechanism

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tg_tinker.types.config import DPConfig


@attrs.frozen(kw_only=True)
class PrivacySettings:
    """A run's privacy parameters, complete: everything that ``DPConfig`` leaves to defaults is decided here."""

    noise_multiplier: float
    max_grad_norm: float
    target_epsilon: float | None
    delta: float
    accountant: str
    sample_rate: float
    expected_batch_size: int
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: DPConfig, *, default_batch_size: int | None) -> PrivacySettings:
        """Complete a config. ``default_batch_size`` is TG's ``batch_size * gradient_accumulation_steps``, Loops' None.

        Raises ``InvalidRequestError`` where neither says.
        """
        expected = config.expected_batch_size or default_batch_size
        if expected is None:
            constraint = "a public number to divide by, as the batch's own size is private"
            message = f"dp_config.expected_batch_size: expected {constraint}"
            raise InvalidRequestError(message, field="dp_config.expected_batch_size", constraint=constraint)
        return cls(
            noise_multiplier=config.noise_multiplier,
            max_grad_norm=config.max_grad_norm,
            target_epsilon=config.target_epsilon,
            delta=config.target_delta,
            accountant=config.accountant_type,
            sample_rate=_sample_rate(config, expected),
            expected_batch_size=expected,
            warnings=tuple(_warnings(config, expected)),
        )

    def mechanism(self, *, noise: bool = True) -> Mechanism:
        """Describe one step to the accountant."""
        return Mechanism(self.noise_multiplier if noise else 0.0, self.sample_rate)


def _sample_rate(config: DPConfig, expected: int) -> float:
    """Take what was declared; without a declaration claim nothing (q = 1)."""
    if config.sample_rate is not None:
        return config.sample_rate
    if config.dataset_size is None:
        return 1.0
    if expected > config.dataset_size:
        constraint = f"at least the expected batch size ({expected})"
        raise InvalidRequestError(
            f"dp_config.dataset_size: expected {constraint}", field="dp_config.dataset_size", constraint=constraint
        )
    return expected / config.dataset_size


def _warnings(config: DPConfig, expected: int) -> Iterator[str]:
    if config.dataset_size is None:
        return
    bound = 1.0 / config.dataset_size
    if config.target_delta >= bound:
        yield f"target_delta {config.target_delta:g} is not below 1/dataset_size ({bound:g}): too weak a promise"
    drawn = config.dataset_size * (expected / config.dataset_size if config.sample_rate is None else config.sample_rate)
    if abs(drawn - expected) >= 1.0:
        yield (
            f"sample_rate {config.sample_rate:g} of {config.dataset_size} examples draws {drawn:g} a step, "
            f"expected_batch_size is {expected}: one of the three is not what you mean"
        )
