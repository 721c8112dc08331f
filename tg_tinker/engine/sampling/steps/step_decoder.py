"""Decoding for any causal language model: transformers' own forward pass, where ``slot_decoder`` knows no faster one.

Sequences of one adapter and of about one length share a pass where the model was seen to allow it (``batch_evidence``).
Where it does not they take turns, token by token.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import torch

from tg_tinker.engine.sampling.steps import batch_evidence
from tg_tinker.engine.sampling.steps.causal_pass import CausalPass
from tg_tinker.engine.sampling.steps.prompt_reading import pack, read_single, read_together
from tg_tinker.engine.sampling.steps.step_groups import Group, Single, StepPrompt, StepSequence
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.sampling.decoder import Chunk, DecodingSequence, Prompt
    from tg_tinker.engine.sampling.steps.padded_cache import State
    from tg_tinker.engine.sampling.steps.step_groups import StepGroup

__all__ = ["StepDecoder"]

logger = logging.getLogger("tg_tinker.engine.sampling.steps.step_decoder")


class StepDecoder:
    """A decoder for every model that keeps a key/value cache."""

    def __init__(self, base: BaseModel) -> None:
        """Check that the model generates token by token, and find out whether sequences can share its passes.

        Raises:
            InvalidRequestError: when it does not generate token by token.

        """
        config: Any = base.model.config
        if config.is_encoder_decoder:
            message = f"{base.name} is an encoder-decoder model; sampling needs a causal language model"
            raise InvalidRequestError(message, field="base_model", constraint="a causal language model")
        self._run = CausalPass(base)
        objection = batch_evidence.objection(base)
        if objection:
            logger.warning("%s is sampled one sequence after another: %s", base.name, objection)
        self._together = objection is None
        self.whole_prompts = not self._together  # some caches cannot take a second chunk
        self.reuses_prefixes = self._together
        self._groups: list[StepGroup] = []
        self._batch: tuple[StepSequence, ...] | None = None

    def open(self, tokens: tuple[int, ...], adapter: FrozenAdapter | None, prefix: Tensor | None) -> StepPrompt:
        """Begin a prompt, its first tokens taken from ``prefix``."""
        prompt = StepPrompt(tokens, adapter)
        if prefix is not None:
            prompt.state = [(keys, values) for keys, values in prefix]
            prompt.done = prefix.shape[3]
        return prompt

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Read the chunks; give the wanted logits (sum of wanted, vocabulary) in their order."""
        if not self._together:
            return torch.cat([read_single(self._run, chunk) for chunk in chunks])
        parts: dict[Chunk, Tensor] = {}
        for members in pack(chunks):
            parts |= zip(members, read_together(self._run, members), strict=True)
        return torch.cat([parts[chunk] for chunk in chunks])

    def join(self, prompt: Prompt, expected: int) -> StepSequence:
        """Begin a sequence after a prompt that is read."""
        del expected
        self._batch = None
        group = self._group_for(cast("StepPrompt", prompt))
        sequence = group.add(cast("StepPrompt", prompt))
        if group not in self._groups:
            self._groups.append(group)
        return sequence

    def batch(self) -> tuple[DecodingSequence, ...]:
        """Give every sequence in the order of ``decode``; the same object while nothing joined or left."""
        if self._batch is None:
            for group in self._groups:
                group.settle()
            self._batch = tuple(member for group in self._groups for member in group.members)
        return self._batch

    def crowded(self) -> Sequence[DecodingSequence]:
        """Give the sequences that have no room for one more token."""
        return [member for group in self._groups if group.full for member in group.members]

    def grow(self, sequence: DecodingSequence) -> None:
        """Make room for more tokens of all that share its passes."""
        self._batch = None
        cast("StepSequence", sequence).group.grow()

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Read one token for each sequence of ``batch``, group by group; give logits (B, vocabulary)."""
        parts: list[Tensor] = []
        start = 0
        for group in self._groups:
            end = start + len(group.members)
            parts.append(group.decode(self._run, tokens[start:end]))
            start = end
        return torch.cat(parts)

    def leave(self, sequence: DecodingSequence) -> None:
        """End a sequence and free its place at once; with the last of a group goes its memory."""
        own = cast("StepSequence", sequence)
        own.group.remove(own)
        self._groups = [group for group in self._groups if group.members]
        self._batch = None

    def read(self, source: Prompt | DecodingSequence) -> Tensor | None:
        """Give the state (layers, 2, key heads, tokens, head size) after every token read so far.

        None where a model has no one shape for it, or where sequences do not share passes.
        """
        if isinstance(source, StepPrompt):
            return _stacked(source.state)
        sequence = cast("StepSequence", source)
        return _stacked(sequence.group.read(sequence))

    def _group_for(self, prompt: StepPrompt) -> StepGroup:
        found = next((group for group in self._groups if group.takes(prompt)), None)
        if found is not None:
            return found
        return Group(prompt.adapter, prompt.state) if self._together else Single(prompt.adapter)


def _stacked(state: State | None) -> Tensor | None:
    """Put a state into one tensor, where all of it has one shape."""
    parts = [part for pair in state or () for part in pair]
    if len({part.shape for part in parts}) != 1:
        return None
    return torch.stack(parts).view(-1, 2, *parts[0].shape)
