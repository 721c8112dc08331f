"""Decoding for adapters that carry whole modules: a slot decoder over their weights each, beside the shared one.

Whoever carries none goes to the shared decoder, as if this were not here. A decoder of its own reads the base model's
weights where the adapter has nothing instead; of those it copies only what is fused with something of the adapter's. It
goes when its adapter goes.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from tg_tinker.engine.lora import adapters
from tg_tinker.engine.sampling.slots import fused_weights
from tg_tinker.engine.sampling.slots.slot_decoder import SlotDecoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.sampling.decoder import Chunk, DecodingSequence, Prompt

__all__ = ["RoutedDecoder"]


class RoutedDecoder:
    """The slot decoders of one base model."""

    whole_prompts = False
    reuses_prefixes = True

    def __init__(self, base: BaseModel, *, max_length: int) -> None:
        self._base = base
        self._max_length = max_length
        self._shared = SlotDecoder(base, fused_weights.read(base.model), max_length=max_length)
        self._own: WeakKeyDictionary[FrozenAdapter, SlotDecoder] = WeakKeyDictionary()
        self._batches: list[tuple[DecodingSequence, ...]] = []  # of the decoders, and all of them in one
        self._batch: tuple[DecodingSequence, ...] = ()

    def open(self, tokens: tuple[int, ...], adapter: FrozenAdapter | None, prefix: Tensor | None) -> Prompt:
        """Begin a prompt, its first tokens taken from ``prefix``.

        Raises:
            InvalidRequestError: when the adapter does not fit the model.

        """
        return self._of(adapter).open(tokens, adapter, prefix)

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Read the chunks; give the wanted logits (sum of wanted, vocabulary) in their order."""
        parts: dict[Chunk, Tensor] = {}
        for decoder, members in self._by_decoder(chunks).items():
            logits = decoder.prefill(members)
            parts |= zip(members, logits.split([chunk.wanted for chunk in members]), strict=True)
        return torch.cat([parts[chunk] for chunk in chunks])

    def join(self, prompt: Prompt, expected: int) -> DecodingSequence:
        """Begin a sequence after a prompt that is read; ``expected`` more tokens are likely."""
        return self._of(prompt.adapter).join(prompt, expected)

    def batch(self) -> tuple[DecodingSequence, ...]:
        """Give every sequence in the order of ``decode``; the same object while nothing joined or left."""
        batches = [decoder.batch() for decoder in self._decoders()]
        if len(batches) != len(self._batches) or any(a is not b for a, b in zip(batches, self._batches, strict=True)):
            self._batches, self._batch = batches, tuple(chain.from_iterable(batches))
        return self._batch

    def crowded(self) -> Sequence[DecodingSequence]:
        """Give the sequences that have no room for one more token."""
        return [sequence for decoder in self._decoders() for sequence in decoder.crowded()]

    def grow(self, sequence: DecodingSequence) -> None:
        """Make room for more tokens."""
        self._of(sequence.adapter).grow(sequence)

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Read one token for each sequence of ``batch``; give logits (B, vocabulary)."""
        parts: list[Tensor] = []
        start = 0
        for decoder in self._decoders():
            end = start + len(decoder.batch())
            if end > start:
                parts.append(decoder.decode(tokens[start:end]))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def leave(self, sequence: DecodingSequence) -> None:
        """End a sequence and free its place at once."""
        self._of(sequence.adapter).leave(sequence)
        self._batches, self._batch = [], ()  # they hold the sequence, and that its adapter

    def read(self, source: Prompt | DecodingSequence) -> Tensor | None:
        """Give the state (layers, 2, key heads, tokens, head size) after every token read so far."""
        return self._of(source.adapter).read(source)

    def _decoders(self) -> list[SlotDecoder]:
        return [self._shared, *self._own.values()]

    def _of(self, adapter: FrozenAdapter | None) -> SlotDecoder:
        if adapter is None or not adapter.saved:
            return self._shared
        decoder = self._own.get(adapter)
        if decoder is None:
            with adapters.active(self._base, adapter):
                weights = fused_weights.read(self._base.model, in_place=False)
            decoder = self._own[adapter] = SlotDecoder(self._base, weights, max_length=self._max_length)
        return decoder

    def _by_decoder(self, chunks: Sequence[Chunk]) -> dict[SlotDecoder, list[Chunk]]:
        groups: dict[SlotDecoder, list[Chunk]] = {}
        for chunk in chunks:
            groups.setdefault(self._of(chunk.prompt.adapter), []).append(chunk)
        return groups
