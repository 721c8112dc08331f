from __future__ import annotations

import math
import subprocess
import sys
from random import Random, SystemRandom

import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy.poisson import PoissonSampler


def test_every_example_joins_with_the_same_probability() -> None:
    """Over many draws each index appears at its rate, and batch sizes vary as a binomial does."""
    size, rate, draws = 50, 0.2, 4000
    sampler = PoissonSampler(size, rate, Random(1))
    batches = [sampler.draw() for _ in range(draws)]
    error = 5 * math.sqrt(rate * (1 - rate) / draws)
    for index in range(size):
        assert abs(sum(index in batch for batch in batches) / draws - rate) < error
    sizes = [len(batch) for batch in batches]
    mean = sum(sizes) / draws
    variance = sum((value - mean) ** 2 for value in sizes) / draws
    assert mean == pytest.approx(sampler.expected_batch_size, abs=5 * math.sqrt(8 / draws))
    assert variance == pytest.approx(size * rate * (1 - rate), rel=0.12)


def test_examples_join_independently() -> None:
    """Two indices appear together as often as chance says."""
    sampler, draws = PoissonSampler(10, 0.5, Random(2)), 4000
    batches = [sampler.draw() for _ in range(draws)]
    for first, second in ((0, 1), (0, 9), (4, 5)):
        both = sum(first in batch and second in batch for batch in batches) / draws
        assert abs(both - 0.25) < 5 * math.sqrt(0.1875 / draws)


def test_batches_are_ascending_without_repetition() -> None:
    """A batch lists each index once, in order, within the data."""
    sampler = PoissonSampler(1000, 0.3, Random(3))
    for batch, _ in zip(sampler, range(50), strict=False):
        assert batch == sorted(set(batch))
        assert all(0 <= index < 1000 for index in batch)


def test_batches_may_be_empty_or_whole() -> None:
    """At a tiny rate most batches are empty; at rate 1 every batch is the whole data."""
    assert PoissonSampler(10, 1e-300, Random(4)).draw() == []
    assert PoissonSampler(5, 1.0).draw() == [0, 1, 2, 3, 4]


def test_the_systems_randomness_is_the_default() -> None:
    """Without an argument the draws come from the system, and a repeated run differs."""
    sampler = PoissonSampler(1000, 0.5)
    assert isinstance(sampler._rng, SystemRandom)
    assert sampler.draw() != sampler.draw()


@pytest.mark.parametrize(
    ("size", "rate", "field"),
    [(0, 0.5, "dataset_size"), (9, 0.0, "sample_rate"), (9, 1.1, "sample_rate"), (9, math.nan, "sample_rate")],
)
def test_impossible_arguments_are_refused(size: int, rate: float, field: str) -> None:
    """The error names the argument."""
    with pytest.raises(InvalidRequestError) as caught:
        PoissonSampler(size, rate)
    assert caught.value.field == field


def test_it_needs_no_torch() -> None:
    """The sampler is for the client's side: it imports neither torch nor numpy."""
    code = "import sys, tg_tinker.privacy.poisson; print(sorted({'torch', 'numpy', 'opacus'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
