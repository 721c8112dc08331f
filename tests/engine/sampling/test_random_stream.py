from __future__ import annotations

import numpy as np
import pytest

from tg_tinker.engine.sampling.random_stream import RandomStream


@pytest.mark.parametrize("seed", [0, 12345, 2**64 - 1])
def test_positions_are_those_of_numpy_philox(seed):
    """Number i is number i of numpy's Philox generator with that key."""
    expected = np.random.Generator(np.random.Philox(key=seed)).random(700)
    stream = RandomStream(seed)
    assert [stream.at(position) for position in range(700)] == expected.tolist()


def test_any_order_of_positions():
    """Looking back, or far ahead, changes nothing."""
    stream = RandomStream(3)
    numbers = {position: stream.at(position) for position in (900, 3, 255, 256, 0)}
    again = RandomStream(3)
    assert {position: again.at(position) for position in sorted(numbers)} == numbers


def test_seeds_differ():
    """Neighbouring seeds have nothing in common."""
    assert not {RandomStream(1).at(n) for n in range(100)} & {RandomStream(2).at(n) for n in range(100)}
