"""LoRA for a batch in which rows belong to different adapters, on the fused matrices of ``fused_weights``.

One adapter for all rows is two products. A few are two products each, on rows gathered by adapter. Many go through one
batched product over padded groups. Rows of the base model alone are left as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.sampling.slots.fused_weights import DecoderWeights, Projection

__all__ = ["AdapterRows", "FusedAdapter", "Stacks", "fuse"]

_LOOP_UP_TO = 3  # adapters; above, one batched product is cheaper than a product each
_PADDING_UP_TO = 4  # padded rows per real row that a batched product may cost

Factors = tuple[Tensor, Tensor]  # down (in, R), up (R, out) with the scale in it


@attrs.frozen(eq=False)
class FusedAdapter:
    """An adapter's factors for each fused matrix, None where it has none."""

    factors: tuple[Factors | None, ...]


def fuse(adapter: FrozenAdapter, weights: DecoderWeights) -> FusedAdapter:
    """Lay out ``adapter`` for the fused matrices.

    Raises:
        InvalidRequestError: when the adapter was made for another model.

    """
    projections = weights.projections
    known = {name: (stop - start, p.weight.shape[1]) for p in projections for name, start, stop in p.parts}
    wrong = [name for name, (a, b) in adapter.layers.items() if known.get(name) != (b.shape[0], a.shape[1])]
    if wrong:
        message = f"the adapter does not fit this base model: layer {wrong[0]} ({len(wrong)} in all)"
        raise InvalidRequestError(message, field="adapter", constraint="an adapter made on the same base model")
    return FusedAdapter(tuple(_factors(projection, adapter.layers, adapter.scale) for projection in projections))


def _factors(projection: Projection, layers: Mapping[str, Factors], scale: float) -> Factors | None:
    """Join the factors of the parts: downs side by side, ups on a diagonal of blocks."""
    present = [(layers[name], start, stop) for name, start, stop in projection.parts if name in layers]
    if not present:
        return None
    like = projection.weight
    downs = [a.to(like.device, like.dtype) for (a, _), _, _ in present]
    up = like.new_zeros(sum(len(a) for a in downs), len(like))
    rank = 0
    for (a, b), start, stop in present:
        up[rank : rank + len(a), start:stop] = (b * scale).t()
        rank += len(a)
    return torch.cat(downs).t().contiguous(), up


class Stacks:
    """The factors of many adapters as one block for each matrix; kept while the same adapters are in use."""

    def __init__(self) -> None:
        self._adapters: tuple[FusedAdapter, ...] = ()
        self._stacks: dict[int, Factors | None] = {}

    def clear(self) -> None:
        """Let go of every adapter."""
        self.use(())

    def use(self, adapters: tuple[FusedAdapter, ...]) -> None:
        """Stack these from now on."""
        if adapters != self._adapters:
            self._adapters, self._stacks = adapters, {}

    def at(self, index: int) -> Factors | None:
        """Give down (G, in, R) and up (G, R, out) at matrix ``index``, ranks padded with zeros to the largest."""
        if index not in self._stacks:
            self._stacks[index] = _stack([adapter.factors[index] for adapter in self._adapters])
        return self._stacks[index]


class AdapterRows:
    """Which adapter each row of a batch belongs to, ready to be applied at every matrix of a pass."""

    def __init__(
        self, runs: Sequence[tuple[FusedAdapter | None, int]], *, device: torch.device, stacks: Stacks
    ) -> None:
        """Take the batch as runs of rows: (adapter, number of rows that follow one another)."""
        groups: dict[FusedAdapter, list[int]] = {}
        row = 0
        for adapter, count in runs:
            if adapter is not None:
                groups.setdefault(adapter, []).extend(range(row, row + count))
            row += count
        self._product = _choose(groups, row, device, stacks)

    def add(self, output: Tensor, x: Tensor, index: int) -> None:
        """Add to ``output`` (N, out) in place what the adapters make of ``x`` (N, in) at matrix ``index``."""
        if self._product is not None:
            self._product.add(output, x, index)


Groups = dict[FusedAdapter, list[int]]


def _choose(groups: Groups, rows: int, device: torch.device, stacks: Stacks) -> _Whole | _Loop | _Batched | None:
    if not groups:
        return None
    if len(groups) == 1 and len(next(iter(groups.values()))) == rows:
        return _Whole(next(iter(groups)))
    padded = len(groups) * max(len(members) for members in groups.values())
    if len(groups) > _LOOP_UP_TO and padded <= _PADDING_UP_TO * rows:
        return _Batched(groups, device, stacks)
    return _Loop(groups, device)


class _Whole:
    """Every row has the same adapter."""

    def __init__(self, adapter: FusedAdapter) -> None:
        self._adapter = adapter

    def add(self, output: Tensor, x: Tensor, index: int) -> None:
        if (factors := self._adapter.factors[index]) is not None:
            output.addmm_(x.mm(factors[0]), factors[1])


class _Loop:
    """A product for each adapter, on its own rows."""

    def __init__(self, groups: Groups, device: torch.device) -> None:
        self._groups = [(adapter, torch.tensor(members, device=device)) for adapter, members in groups.items()]

    def add(self, output: Tensor, x: Tensor, index: int) -> None:
        for adapter, members in self._groups:
            if (factors := adapter.factors[index]) is not None:
                output.index_add_(0, members, x.index_select(0, members).mm(factors[0]).mm(factors[1]))


class _Batched:
    """One batched product over groups padded to the largest."""

    def __init__(self, groups: Groups, device: torch.device, stacks: Stacks) -> None:
        adapters = tuple(sorted(groups, key=id))
        members = [groups[adapter] for adapter in adapters]
        size = max(len(rows) for rows in members)
        padded = [row for rows in members for row in (rows + rows[:1] * size)[:size]]
        real = [group * size + place for group, rows in enumerate(members) for place in range(len(rows))]
        self._shape = (len(adapters), size, -1)
        self._padded = torch.tensor(padded, device=device)  # (G * size,): rows of the batch
        self._real = torch.tensor(real, device=device)  # (N',): those of the padded rows that count
        self._members = torch.tensor([row for rows in members for row in rows], device=device)  # (N',): where they go
        self._adapters, self._stacks = adapters, stacks

    def add(self, output: Tensor, x: Tensor, index: int) -> None:
        self._stacks.use(self._adapters)
        if (stack := self._stacks.at(index)) is not None:
            grouped = x.index_select(0, self._padded).view(self._shape)
            delta = grouped.bmm(stack[0]).bmm(stack[1]).flatten(0, 1)
            output.index_add_(0, self._members, delta.index_select(0, self._real))


def _stack(factors: Sequence[Factors | None]) -> Factors | None:
    present = [pair for pair in factors if pair is not None]
    if not present:
        return None
    rank = max(pair[1].shape[0] for pair in present)
    down = present[0][0].new_zeros(len(factors), present[0][0].shape[0], rank)
    up = present[0][1].new_zeros(len(factors), rank, present[0][1].shape[1])
    for group, pair in enumerate(factors):
        if pair is not None:
            down[group, :, : pair[0].shape[1]] = pair[0]
            up[group, : pair[1].shape[0]] = pair[1]
    return down, up
