"""Keys and values of running sequences, in pools of equal capacity that sequences move through as they grow.

A pool is one block of rows per layer. Its rows in use are kept together, so that attention reads a plain slice of it,
and no further than the longest of its sequences: short ones pay nothing for long ones elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from tg_tinker.engine.sampling.decoder import DecodingSequence

if TYPE_CHECKING:
    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter

__all__ = ["KeyValueCache", "Pool", "SlotSequence"]

_LEAST_CAPACITY = 64  # tokens
_SHRINK_ABOVE = 8  # rows; smaller pools are not worth copying


@attrs.define(eq=False)
class SlotSequence(DecodingSequence):
    """A sequence with a place: a row of a pool."""

    pool: Pool
    row: int


class Pool:
    """Rows of one capacity: for each layer (2, rows, key heads, capacity, head size), keys then values.

    Every entry that was never written is 0, and a row is cleared when it is given away: attention multiplies what it
    masks by 0, which would keep another sequence's NaN.
    """

    def __init__(self, capacity: int, layers: int, like: Tensor) -> None:
        """Start without rows; ``like`` has the shape (key heads, head size), the dtype and the device."""
        self.capacity = capacity
        heads, size = like.shape
        self.layers = [like.new_zeros(2, 0, heads, capacity, size) for _ in range(layers)]
        self.members: list[SlotSequence | None] = []
        self._rows = 0

    @property
    def used(self) -> bool:
        """Whether any row has a sequence."""
        return any(member is not None for member in self.members)

    def take_row(self) -> int:
        """Find a row that nobody uses, making more where there is none."""
        if None in self.members:
            return self.members.index(None)
        if len(self.members) == self._rows:
            self._resize(max(1, 2 * self._rows))
        return len(self.members)

    def place(self, sequence: SlotSequence, keys_values: list[Tensor]) -> None:
        """Fill the sequence's row with (2, heads, length, size) per layer, and zeros after that."""
        row, length = sequence.row, sequence.length
        for layer, source in zip(self.layers, keys_values, strict=True):
            layer[:, row, :, :length] = source
            layer[:, row, :, length:] = 0
        self.members[row : row + 1] = [sequence]

    def read(self, sequence: SlotSequence) -> list[Tensor]:
        """View a sequence's keys and values: (2, heads, length, size) per layer."""
        return [layer[:, sequence.row, :, : sequence.length] for layer in self.layers]

    def compact(self) -> None:
        """Move the last rows into the holes that others left, and give back memory that is far too much."""
        while None in self.members:
            last = self.members.pop()
            if last is None:
                continue
            hole = self.members.index(None)
            for layer in self.layers:
                layer[:, hole] = layer[:, last.row]
            self.members[hole], last.row = last, hole
        if self._rows > _SHRINK_ABOVE and 4 * len(self.members) <= self._rows:
            self._resize(self._rows // 2)

    def _resize(self, rows: int) -> None:
        kept = min(rows, self._rows)
        for index, layer in enumerate(self.layers):
            larger = layer.new_zeros(2, rows, *layer.shape[2:])
            larger[:, :kept] = layer[:, :kept]
            self.layers[index] = larger
        self._rows = rows


class KeyValueCache:
    """Every pool, and the changes of membership."""

    def __init__(self, layers: int, like: Tensor, max_length: int) -> None:
        """Make an empty cache; ``like`` has the shape (key heads, head size), the dtype and the device."""
        self._layers, self._like, self._max_length = layers, like, max_length
        self._pools: dict[int, Pool] = {}

    @property
    def empty(self) -> bool:
        """Whether no sequence is left."""
        return not self._pools

    def insert(self, keys_values: list[Tensor], adapter: FrozenAdapter | None, room: int) -> SlotSequence:
        """Place a sequence of (2, heads, length, size) per layer where ``room`` tokens fit."""
        length = keys_values[0].shape[2]
        pool = self._pool(max(room, length + 1))
        sequence = SlotSequence(adapter, length, pool, pool.take_row())
        pool.place(sequence, keys_values)
        return sequence

    def grow(self, sequence: SlotSequence) -> None:
        """Move a sequence to the next larger pool."""
        old, old_row = sequence.pool, sequence.row
        new = self._pool(old.capacity + 1)
        keys_values, row = old.read(sequence), new.take_row()
        sequence.pool, sequence.row = new, row
        new.place(sequence, keys_values)
        self._vacate(old, old_row)

    def remove(self, sequence: SlotSequence) -> None:
        """Free a sequence's row at once, and with the last one the memory of its pool."""
        self._vacate(sequence.pool, sequence.row)

    def pools(self) -> list[Pool]:
        """Give the pools that are in use, compacted, the shortest first."""
        for capacity in [capacity for capacity, pool in self._pools.items() if not pool.used]:
            del self._pools[capacity]  # made for a sequence that then found no memory
        pools = [self._pools[capacity] for capacity in sorted(self._pools)]
        for pool in pools:
            pool.compact()
        return pools

    def _vacate(self, pool: Pool, row: int) -> None:
        pool.members[row] = None
        if not pool.used:
            del self._pools[pool.capacity]

    def _pool(self, tokens: int) -> Pool:
        capacity = _LEAST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        capacity = min(capacity, self._max_length)
        if capacity not in self._pools:
            self._pools[capacity] = Pool(capacity, self._layers, self._like)
        return self._pools[capacity]
