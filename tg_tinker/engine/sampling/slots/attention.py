"""Attention of a pass, span by span: a span is rows of the pass whose keys and values lie together.

Each span first stores the keys and values of its rows and then attends to everything stored so far. Grouped queries
are rows of one key head, so that keys and values are never repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.sampling.slots.key_value_cache import Pool, SlotSequence

__all__ = ["PoolSpan", "PromptSpan", "Span"]


class Span(Protocol):
    """Rows of a pass that attend together."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take (N, heads, head size) of the whole pass; give (rows of the span, query heads * head size)."""
        ...


class PromptSpan:
    """Consecutive tokens of one prompt."""

    def __init__(self, start: int, done: int, count: int, keys_values: Tensor) -> None:
        """Take rows from ``start`` as tokens from ``done`` on; ``keys_values``: (layers, 2, heads, tokens, size)."""
        self._rows = slice(start, start + count)
        self._tokens = slice(done, done + count)
        self._keys_values = keys_values
        self._mask: Tensor | None = None
        if done and count > 1:
            mask = keys_values.new_full((count, done + count), float("-inf"))
            self._mask = mask.triu_(done + 1)  # token done + i sees tokens up to itself

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the keys and values of the chunk; let each of its tokens see those up to itself."""
        stored = self._keys_values[layer]  # (2, key heads, tokens, size)
        stored[0, :, self._tokens] = keys[self._rows].transpose(0, 1)
        stored[1, :, self._tokens] = values[self._rows].transpose(0, 1)
        seen = stored[:, :, None, : self._tokens.stop]
        q = queries[self._rows]  # (T, query heads, size)
        count, heads, size = q.shape
        grouped = q.view(count, seen.shape[1], -1, size).permute(1, 2, 0, 3)  # (key heads, group, T, size)
        shape = (*grouped.shape[:2], -1, -1)
        causal = self._mask is None and count > 1
        k, v = seen[0].expand(shape), seen[1].expand(shape)
        out = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=self._mask, is_causal=causal)
        return out.permute(2, 0, 1, 3).reshape(count, heads * size)


class PoolSpan:
    """One new token of every sequence in a pool."""

    def __init__(self, pool: Pool, members: Sequence[SlotSequence], start: int, device: torch.device) -> None:
        self._pool = pool
        self._members = members
        self._rows = slice(start, start + len(members))
        self._places = torch.arange(len(members), device=device)
        self._positions = self._places
        self._mask: Tensor | None = None
        self.highest = 0

    def crowded(self) -> list[SlotSequence]:
        """Give the sequences whose row is full."""
        return [member for member in self._members if member.length >= self._pool.capacity]

    def begin(self, positions: Tensor) -> None:
        """Take the positions (B,) of the pass; called before each pass."""
        self._positions = positions[self._rows]
        lengths = [member.length for member in self._members]
        self.highest = max(lengths)
        self._mask = None
        if min(lengths) < self.highest:
            columns = torch.arange(self.highest + 1, device=positions.device)
            hidden = columns > self._positions[:, None]  # (n, S)
            mask = self._pool.layers[0].new_zeros(hidden.shape)
            self._mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the key and value of each sequence's token; let it see everything before."""
        stored, rows = self._pool.layers[layer], self._rows  # (2, rows, key heads, capacity, size)
        stored[0, self._places, :, self._positions] = keys[rows]
        stored[1, self._places, :, self._positions] = values[rows]
        k, v = stored[:, : len(self._members), :, : self.highest + 1]
        q = queries[rows]
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])  # (n, key heads, group, size)
        out = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=self._mask)
        return out.reshape(q.shape[0], -1)
