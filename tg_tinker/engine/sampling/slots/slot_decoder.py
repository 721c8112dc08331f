"""Continuous batching for Llama, Mistral, Qwen2 and Qwen3 models: our own forward pass over the model's weights.

Rows of a pass are single tokens of any sequences, so the linear layers see one matrix, whatever adapters the rows
belong to; only attention looks at sequences one by one (while prompts are read) or pool by pool (while decoding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import attrs
import torch
from torch.nn import functional

from tg_tinker.engine.sampling.decoder import Prompt
from tg_tinker.engine.sampling.slots import fused_lora
from tg_tinker.engine.sampling.slots.attention import PoolSpan, PromptSpan, Span
from tg_tinker.engine.sampling.slots.fused_lora import AdapterRows, FusedAdapter, Stacks
from tg_tinker.engine.sampling.slots.key_value_cache import KeyValueCache, SlotSequence
from tg_tinker.engine.sampling.slots.quick_ops import rms_norm
from tg_tinker.engine.sampling.slots.rotary_table import RotaryTable, rotate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.sampling.decoder import Chunk, DecodingSequence
    from tg_tinker.engine.sampling.slots.fused_weights import DecoderWeights

__all__ = ["SlotDecoder"]


@attrs.define(eq=False)
class SlotPrompt(Prompt):
    """A prompt and the keys and values of what is read of it: (layers, 2, key heads, tokens, head size)."""

    keys_values: Tensor = attrs.field(kw_only=True)


@attrs.define(eq=False)
class _Plan:
    """What stays the same from token to token while nothing joins, leaves or moves."""

    sequences: tuple[SlotSequence, ...]
    spans: list[PoolSpan]
    rows: AdapterRows
    positions: Tensor  # (B,) int64: where the next token of each sequence goes


class SlotDecoder:
    """A decoder over ``weights``, for models that ``fused_weights.unsupported`` has nothing against."""

    whole_prompts = False
    reuses_prefixes = True

    def __init__(self, base: BaseModel, weights: DecoderWeights, *, max_length: int) -> None:
        self._weights = weights
        self._device = base.device
        self._rotary = RotaryTable(weights.rotary, device=base.device, dtype=base.dtype)
        like = torch.empty(weights.key_heads, weights.head_size, dtype=base.dtype, device=base.device)
        self._like = like
        self._cache = KeyValueCache(len(weights.layers), like, max_length)
        self._adapters: WeakKeyDictionary[FrozenAdapter, FusedAdapter] = WeakKeyDictionary()
        self._stacks = Stacks()
        self._plan: _Plan | None = None

    def open(self, tokens: tuple[int, ...], adapter: FrozenAdapter | None, prefix: Tensor | None) -> SlotPrompt:
        """Begin a prompt, its first tokens taken from ``prefix``.

        Raises:
            InvalidRequestError: when the adapter does not fit the model.

        """
        self._fused(adapter)
        shape = (len(self._weights.layers), 2, self._like.shape[0], len(tokens), self._like.shape[1])
        prompt = SlotPrompt(tokens, adapter, keys_values=self._like.new_empty(shape))
        if prefix is not None:
            prompt.done = prefix.shape[3]
            prompt.keys_values[:, :, :, : prompt.done] = prefix
        return prompt

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Read the chunks; give the wanted logits (sum of wanted, vocabulary) in their order."""
        tokens = [token for chunk in chunks for token in chunk.prompt.tokens[chunk.prompt.done :][: chunk.count]]
        places = [place for chunk in chunks for place in range(chunk.prompt.done, chunk.prompt.done + chunk.count)]
        positions = torch.tensor(places, device=self._device)
        spans: list[Span] = []
        start = 0
        for chunk in chunks:
            prompt = cast("SlotPrompt", chunk.prompt)
            spans.append(PromptSpan(start, prompt.done, chunk.count, prompt.keys_values))
            start += chunk.count
        rows = self._rows([(chunk.prompt.adapter, chunk.count) for chunk in chunks])
        hidden = self._forward(tokens, positions, max(places), spans, rows)
        for chunk in chunks:
            chunk.prompt.done += chunk.count
        return self._wanted_logits(hidden, chunks)

    def join(self, prompt: Prompt, expected: int) -> SlotSequence:
        """Begin a sequence after a prompt that is read; ``expected`` more tokens are likely."""
        self._plan = None
        keys_values = cast("SlotPrompt", prompt).keys_values
        return self._cache.insert(list(keys_values), prompt.adapter, len(prompt.tokens) + expected)

    def batch(self) -> tuple[DecodingSequence, ...]:
        """Give every sequence in the order of ``decode``; the same object while nothing joined or left."""
        return self._planned().sequences

    def crowded(self) -> Sequence[DecodingSequence]:
        """Give the sequences that have no room for one more token."""
        return [member for span in self._planned().spans for member in span.crowded()]

    def grow(self, sequence: DecodingSequence) -> None:
        """Make room for more tokens."""
        self._plan = None
        self._cache.grow(cast("SlotSequence", sequence))

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Read one token for each sequence of ``batch``; give logits (B, vocabulary)."""
        plan = self._planned()
        for span in plan.spans:
            span.begin(plan.positions)
        highest = max(span.highest for span in plan.spans)
        hidden = self._forward(tokens, plan.positions, highest, plan.spans, plan.rows)
        logits = self._logits(hidden, plan.rows)
        plan.positions += 1
        for sequence in plan.sequences:
            sequence.length += 1
        return logits

    def leave(self, sequence: DecodingSequence) -> None:
        """End a sequence and free its place at once."""
        self._cache.remove(cast("SlotSequence", sequence))
        self._plan = None
        if self._cache.empty:
            self._stacks.clear()

    def read(self, source: Prompt | DecodingSequence) -> Tensor | None:
        """Give the state (layers, 2, key heads, tokens, head size) after every token read so far."""
        if isinstance(source, SlotPrompt):
            return source.keys_values[:, :, :, : source.done]
        sequence = cast("SlotSequence", source)
        return torch.stack(sequence.pool.read(sequence))

    def _planned(self) -> _Plan:
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def _make_plan(self) -> _Plan:
        spans: list[PoolSpan] = []
        sequences: list[SlotSequence] = []
        for pool in self._cache.pools():
            members = cast("list[SlotSequence]", pool.members)  # compacted: no holes
            spans.append(PoolSpan(pool, members, len(sequences), self._device))
            sequences += members
        rows = self._rows([(sequence.adapter, 1) for sequence in sequences])
        positions = torch.tensor([sequence.length for sequence in sequences], device=self._device)
        return _Plan(tuple(sequences), spans, rows, positions)

    def _forward(
        self, tokens: Sequence[int], positions: Tensor, highest: int, spans: Sequence[Span], rows: AdapterRows
    ) -> Tensor:
        """Run the layers over single tokens; give hidden states (N, hidden) before the last norm."""
        weights = self._weights
        query_heads, key_heads = weights.query_heads, weights.key_heads
        cos, sin = self._rotary.at(positions, highest)
        x = functional.embedding(torch.tensor(tokens, device=self._device), weights.embedding)  # (N, hidden)
        for index, layer in enumerate(weights.layers):
            # 1. queries, keys and values of every token, (N, heads, head size)
            h = rms_norm(x, layer.attention_norm, weights.epsilon)
            qkv = layer.qkv(h)
            rows.add(qkv, h, 4 * index)
            heads = qkv.view(x.shape[0], -1, weights.head_size)
            turning, values = heads[:, : query_heads + key_heads], heads[:, query_heads + key_heads :]
            if layer.head_norm is not None:
                turning = rms_norm(turning, None, weights.epsilon) * layer.head_norm
            rotate(turning, cos, sin)
            # 2. attention, sequence by sequence or pool by pool
            queries, keys = turning[:, :query_heads], turning[:, query_heads:]
            parts = [span.attend(index, queries, keys, values) for span in spans]
            attended = parts[0] if len(parts) == 1 else torch.cat(parts)
            layer.attention_out.add_to(x, attended)
            rows.add(x, attended, 4 * index + 1)
            # 3. the gated feed-forward part
            h = rms_norm(x, layer.mlp_norm, weights.epsilon)
            gate_up = layer.gate_up(h)
            rows.add(gate_up, h, 4 * index + 2)
            gate, up = gate_up.chunk(2, dim=-1)
            h = functional.silu(gate).mul_(up)
            layer.down.add_to(x, h)
            rows.add(x, h, 4 * index + 3)
        return x

    def _logits(self, hidden: Tensor, rows: AdapterRows) -> Tensor:
        weights = self._weights
        h = rms_norm(hidden, weights.norm, weights.epsilon)
        logits = weights.head(h)
        rows.add(logits, h, 4 * len(weights.layers))
        return logits

    def _wanted_logits(self, hidden: Tensor, chunks: Sequence[Chunk]) -> Tensor:
        end = 0
        wanted: list[int] = []
        for chunk in chunks:
            end += chunk.count
            wanted += range(end - chunk.wanted, end)
        if not wanted:
            return hidden.new_empty(0, len(self._weights.embedding))
        rows = self._rows([(chunk.prompt.adapter, chunk.wanted) for chunk in chunks])
        return self._logits(hidden[torch.tensor(wanted, device=self._device)], rows)

    def _rows(self, runs: Sequence[tuple[FrozenAdapter | None, int]]) -> AdapterRows:
        fused = [(self._fused(adapter), count) for adapter, count in runs]
        return AdapterRows(fused, device=self._device, stacks=self._stacks)

    def _fused(self, adapter: FrozenAdapter | None) -> FusedAdapter | None:
        """Lay out an adapter once; what is kept goes when the adapter goes."""
        if adapter is None:
            return None
        fused = self._adapters.get(adapter)
        if fused is None:
            fused = self._adapters[adapter] = fused_lora.fuse(adapter, self._weights)
        return fused
