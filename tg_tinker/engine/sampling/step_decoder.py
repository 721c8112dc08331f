"""Decoding for any causal language model: transformers' forward pass with a cache of its own for every sequence.

Requests still take turns token by token, only nothing is computed for several of them at once. It is the fallback where
``slot_decoder`` does not know the architecture.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch

from tg_tinker.engine.lora import adapters
from tg_tinker.engine.sampling.decoder import DecodingSequence, Prompt
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.sampling.decoder import Chunk

__all__ = ["StepDecoder"]


@attrs.define(eq=False)
class StepPrompt(Prompt):
    """A prompt and, once it is read, the cache that the model made of it."""

    cache: Any = None


@attrs.define(eq=False)
class StepSequence(DecodingSequence):
    """A sequence with a cache that nobody else uses."""

    cache: Any


class StepDecoder:
    """A decoder for every model that keeps a key/value cache."""

    whole_prompts = True  # some caches cannot take a second chunk
    reuses_prefixes = False

    def __init__(self, base: BaseModel) -> None:
        """Check that the model generates token by token.

        Raises:
            InvalidRequestError: when it does not.

        """
        config: Any = base.model.config
        if config.is_encoder_decoder:
            message = f"{base.name} is an encoder-decoder model; sampling needs a causal language model"
            raise InvalidRequestError(message, field="base_model", constraint="a causal language model")
        self._base = base
        self._sequences: tuple[StepSequence, ...] = ()

    def open(self, tokens: tuple[int, ...], adapter: FrozenAdapter | None, prefix: Tensor | None) -> StepPrompt:
        """Begin a prompt; there is never a prefix."""
        del prefix
        return StepPrompt(tokens, adapter)

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Read the chunks, each a whole prompt; give the wanted logits (sum of wanted, vocabulary) in their order."""
        parts: list[Tensor] = []
        for chunk in chunks:
            prompt = cast("StepPrompt", chunk.prompt)
            logits, prompt.cache = self._forward(prompt.tokens, prompt.adapter, None)
            prompt.done = len(prompt.tokens)
            parts.append(logits[len(logits) - chunk.wanted :])
        return torch.cat(parts)

    def join(self, prompt: Prompt, expected: int) -> StepSequence:
        """Begin a sequence after a prompt that is read, with a copy of its cache."""
        del expected
        cache = copy.deepcopy(cast("StepPrompt", prompt).cache)
        sequence = StepSequence(prompt.adapter, len(prompt.tokens), cache)
        self._sequences = (*self._sequences, sequence)
        return sequence

    def batch(self) -> tuple[DecodingSequence, ...]:
        """Give every sequence in the order of ``decode``; the same object while nothing joined or left."""
        return self._sequences

    def crowded(self) -> Sequence[DecodingSequence]:
        """Give nothing: these caches grow by themselves."""
        return ()

    def grow(self, sequence: DecodingSequence) -> None:
        """Do nothing: these caches grow by themselves."""

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Read one token for each sequence of ``batch``, one after the other; give logits (B, vocabulary)."""
        parts: list[Tensor] = []
        for sequence, token in zip(self._sequences, tokens, strict=True):
            logits, sequence.cache = self._forward((token,), sequence.adapter, sequence.cache)
            sequence.length += 1
            parts.append(logits)
        return torch.cat(parts)

    def leave(self, sequence: DecodingSequence) -> None:
        """End a sequence and free its cache at once."""
        self._sequences = tuple(other for other in self._sequences if other is not sequence)

    def read(self, source: Prompt | DecodingSequence) -> Tensor | None:
        """Give nothing: what a cache holds differs from model to model."""
        del source
        return None

    def _forward(self, tokens: tuple[int, ...], adapter: FrozenAdapter | None, cache: Any) -> tuple[Tensor, Any]:
        """Run the model over tokens that follow what ``cache`` holds; give logits (T, vocabulary) and the cache.

        Raises:
            InvalidRequestError: when the model made no cache.

        """
        ids = torch.tensor([tokens], device=self._base.device)
        with adapters.active(self._base, adapter):
            output = self._base.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            message = f"{self._base.name} keeps no key/value cache, so it cannot be sampled from token by token"
            raise InvalidRequestError(message, field="base_model", constraint="a model with a key/value cache")
        return output.logits[0], cache
