"""Keys and values of sequences that are decoded in one pass: rows that end together, the shorter ones padded in front.

To the model it is a cache of transformers that grows with every pass. Rows and columns are made in advance, so that a
token, a sequence that joins and one that leaves seldom copy the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["PaddedCache", "State"]

State = list[tuple["Tensor", "Tensor"]]  # for each layer the keys and the values of one sequence, (heads, tokens, size)

_ROOM = 64  # columns, at least, that are made in advance
_SPARE_SHARE = 4  # one column or row in advance for so many in use


class _RoomyLayer(DynamicLayer):
    """The keys and the values of one layer, each (rows, heads, columns, size).

    A row of ``length`` tokens is in the columns from ``end - length`` up to ``end``. Before them it is 0: attention
    multiplies what it masks by 0, which would keep another sequence's NaN.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        DynamicLayer.__init__(self)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers = [like.new_zeros(0, like.shape[0], 0, like.shape[2]) for like in (keys, values)]
        self.rows, self.longest, self.end = 0, 0, 0

    @property
    def room(self) -> int:
        """Columns that are free."""
        return self.buffers[0].shape[2] - self.end

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, tokens, size) behind what is there; give views of all of it."""
        del args, kwargs
        count = key_states.shape[2]
        first = self.end
        self.end += count
        self.longest += count
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, first : self.end] = states
        keys, values = (buffer[: self.rows, :, self.end - self.longest : self.end] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Give the length of the longest row."""
        return self.longest

    def reserve(self, rows: int, length: int) -> None:
        """Make room for so many rows, of up to ``length`` tokens, and for another column."""
        have = self.buffers[0].shape
        if rows <= have[0] and length <= self.end and self.room:
            return
        end = max(length, self.longest)
        height = rows + rows // _SPARE_SHARE
        width = end + max(_ROOM, end // _SPARE_SHARE)
        larger = [old.new_zeros(height, old.shape[1], width, old.shape[3]) for old in self.buffers]
        for new, old in zip(larger, self.buffers, strict=True):
            new[: self.rows, :, end - self.longest : end] = old[: self.rows, :, self.end - self.longest : self.end]
        self.buffers, self.end = larger, end

    def place(self, row: int, state: tuple[Tensor, Tensor]) -> None:
        """Fill a row."""
        for buffer, values in zip(self.buffers, state, strict=True):
            first = self.end - values.shape[1]
            buffer[row, :, :first] = 0
            buffer[row, :, first : self.end] = values

    def move(self, row: int, hole: int) -> None:
        """Put a row elsewhere."""
        for buffer in self.buffers:
            buffer[hole] = buffer[row]

    def read(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """View a row's keys and values, (heads, length, size)."""
        keys, values = (buffer[row, :, self.end - length : self.end] for buffer in self.buffers)
        return keys, values


class PaddedCache(Cache):
    """Every layer; which row is whose is its owner's affair.

    What fails for want of memory leaves it as it was: a layer that has more room than another does no harm.
    """

    def __init__(self, like: State) -> None:
        """Begin without rows, for states of the kind of ``like``."""
        super().__init__(layers=[_RoomyLayer(keys, values) for keys, values in like])

    @property
    def full(self) -> bool:
        """Whether the next pass needs more columns than there are."""
        return not all(layer.room for layer in self._roomy)

    def hold(self, lengths: Sequence[int]) -> None:
        """Say how many tokens each of the first rows holds; others are not in use."""
        for layer in self._roomy:
            layer.rows, layer.longest = len(lengths), max(lengths, default=0)

    def arguments(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Give mask and positions of a pass over one token more in every row; rows of one length need no mask."""
        longest = max(lengths)
        ends = torch.tensor(lengths, device=self._roomy[0].device)[:, None]
        if min(lengths) == longest:
            return {"position_ids": ends}
        mask = torch.arange(longest + 1, device=ends.device) >= longest - ends  # (B, longest + 1)
        return {"attention_mask": mask.long(), "position_ids": ends}

    def reserve(self, rows: int, length: int) -> None:
        """Make room for so many rows, of up to ``length`` tokens, and for another token of each."""
        for layer in self._roomy:
            layer.reserve(rows, length)

    def place(self, row: int, state: State) -> None:
        """Fill a row that there is room for."""
        for layer, part in zip(self._roomy, state, strict=True):
            layer.place(row, part)

    def move(self, row: int, hole: int) -> None:
        """Put a row elsewhere."""
        for layer in self._roomy:
            layer.move(row, hole)

    def read(self, row: int, length: int) -> State:
        """View the state of a row of ``length`` tokens."""
        return [layer.read(row, length) for layer in self._roomy]

    @property
    def _roomy(self) -> list[_RoomyLayer]:
        return cast("list[_RoomyLayer]", self.layers)
