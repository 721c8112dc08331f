from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from tg_tinker.privacy.noise import NoiseStream, release_id, step_key

STEP: dict[str, Any] = {
    "lineage": "run-1",
    "step": 7,
    "gradient_digest": "sha256:00",
    "noise_multiplier": 1.0,
    "max_grad_norm": 0.5,
}
SECRET = bytes(range(32))
DRAWS = 100_000


def draw(secret: bytes = SECRET, count: int = DRAWS, **changes: Any) -> np.ndarray:
    """Draw the noise of a step."""
    return NoiseStream(step_key(secret, **{**STEP, **changes})).normal(count)


def test_the_noise_is_standard_normal() -> None:
    """Over 10^5 draws four moments are normal to five standard errors, and so is the distribution."""
    values = draw()
    error = 5 / np.sqrt(DRAWS)
    assert abs(values.mean()) < error
    assert abs(values.var() - 1.0) < error * np.sqrt(2)
    assert abs((values**3).mean()) < error * np.sqrt(15)
    assert abs((values**4).mean() - 3.0) < error * np.sqrt(96)
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert np.abs(values).max() > 4.0


def test_neighbouring_values_are_uncorrelated() -> None:
    """A value says nothing about the next ones."""
    values = draw()
    for lag in (1, 2, 3, 4, 65536):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / np.sqrt(DRAWS - lag)


def test_the_same_step_draws_the_same_noise() -> None:
    """A replay is equal to the last bit, however the values are asked for."""
    assert np.array_equal(draw(), draw())
    stream = NoiseStream(step_key(SECRET, **STEP))
    whole = NoiseStream(step_key(SECRET, **STEP)).normal(1 << 17)
    assert np.array_equal(np.concatenate([stream.normal(1 << 16), stream.normal(1 << 16)]), whole)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 8},
        {"lineage": "run-2"},
        {"gradient_digest": "sha256:01"},
        {"noise_multiplier": 1.0000000000000002},
        {"max_grad_norm": 0.6},
        {"secret": b"another secret of 32 bytes......"},
    ],
)
def test_any_other_step_draws_independent_noise(change: dict[str, Any]) -> None:
    """Another step, run, gradient, σ, C or server: noise that is uncorrelated with this one."""
    other = draw(**change)
    assert abs(np.corrcoef(draw(), other)[0, 1]) < 5 / np.sqrt(DRAWS)
    assert not np.any(draw() == other)


def test_fields_cannot_run_into_each_other() -> None:
    """Moving a letter from one field to the next gives another key."""
    first = step_key(SECRET, **{**STEP, "lineage": "ab", "gradient_digest": "c"})
    second = step_key(SECRET, **{**STEP, "lineage": "a", "gradient_digest": "bc"})
    assert first != second


def test_a_release_id_does_not_give_the_key_away() -> None:
    """The id is the same for a replay, another for another step, and no part of the key."""
    key = step_key(SECRET, **STEP)
    assert release_id(key) == release_id(step_key(SECRET, **STEP))
    assert release_id(key) != release_id(step_key(SECRET, **{**STEP, "step": 8}))
    assert release_id(key) not in key.hex()


def test_no_value_is_infinite() -> None:
    """Even the smallest uniform gives a finite value: zero is never drawn."""
    assert np.isfinite(draw(count=1_000_000)).all()
