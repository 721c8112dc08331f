"""A random stream per request: number ``i`` is a function of (seed, i) alone.

So a request draws the same numbers whatever else is running, on every machine and in every process.
"""

from __future__ import annotations

import numpy as np

__all__ = ["RandomStream"]

_BLOCK = 256  # numbers made at a time
_PER_COUNT = 4  # numbers that one step of the counter yields


class RandomStream:
    """Uniform numbers of [0, 1) by position.

    The generator is Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the
    seed as its key: position ``i`` is number ``i`` of ``numpy.random.Generator(numpy.random.Philox(key=seed))``.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._block = -1
        self._numbers: list[float] = []

    def at(self, position: int) -> float:
        """Give the number at ``position``."""
        block, offset = divmod(position, _BLOCK)
        if block != self._block:
            counter = block * (_BLOCK // _PER_COUNT)
            generator = np.random.Generator(np.random.Philox(key=self._seed, counter=counter))
            self._numbers = generator.random(_BLOCK).tolist()
            self._block = block
        return self._numbers[offset]
