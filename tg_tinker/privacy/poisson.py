"""The sampling that amplified privacy assumes: every example joins each batch on its own, with the same probability."""

from __future__ import annotations

import math
from random import Random, SystemRandom
from typing import TYPE_CHECKING

from tg_tinker.types import arguments, checks

if TYPE_CHECKING:
    from collections.abc import Iterator


class PoissonSampler:
    """Draws batches of example indices, each example with probability ``sample_rate``, independently every time.

    A batch may be empty: take the step all the same (``optim_step`` then adds noise to nothing): leaving it out would
    tell that it was empty. The draws must stay secret, so the system's randomness is the default.
    """

    def __init__(self, dataset_size: int, sample_rate: float, rng: Random | None = None) -> None:
        if not isinstance(sample_rate, int | float) or not 0.0 < sample_rate <= 1.0:
            raise checks.refuse("sample_rate", "a number above 0 and at most 1", sample_rate)
        self._size = arguments.whole("dataset_size", dataset_size, 1)
        self._rate = sample_rate
        self._rng = SystemRandom() if rng is None else rng

    @property
    def expected_batch_size(self) -> float:
        """Mean number of examples in a batch."""
        return self._size * self._rate

    def draw(self) -> list[int]:
        """Draw one batch of indices, ascending."""
        if self._rate == 1.0:
            return list(range(self._size))
        batch: list[int] = []
        position = self._gap()
        while position < self._size:
            batch.append(position)
            position += 1 + self._gap()
        return batch

    def __iter__(self) -> Iterator[list[int]]:
        """Draw batches without end."""
        while True:
            yield self.draw()

    def _gap(self) -> int:
        """Count the examples left out before the next one: geometric, so that a draw costs what the batch is."""
        uniform = 1.0 - self._rng.random()  # in (0, 1]
        return int(min(math.log(uniform) / math.log1p(-self._rate), self._size))
