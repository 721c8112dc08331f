"""Sequences that are decoded in one pass: those of one adapter and of about one length where the model allows it.

Otherwise each for itself.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from tg_tinker.engine.sampling.decoder import DecodingSequence, Prompt
from tg_tinker.engine.sampling.steps.padded_cache import PaddedCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.sampling.steps.causal_pass import CausalPass
    from tg_tinker.engine.sampling.steps.padded_cache import State

__all__ = ["Group", "Single", "StepGroup", "StepPrompt", "StepSequence"]

_PADDING = 512  # columns that a row may leave empty, beside as many as it fills


@attrs.define(eq=False)
class StepPrompt(Prompt):
    """A prompt and what the model keeps of its part that is read."""

    state: State = attrs.field(factory=list)  # of a prompt for a group
    cache: Any = None  # of a prompt for itself: the model's own


@attrs.define(eq=False)
class StepSequence(DecodingSequence):
    """A sequence and where its keys and values are."""

    group: StepGroup


class StepGroup(Protocol):
    """What a pass decodes; ``members`` are in the order of its rows."""

    adapter: FrozenAdapter | None
    members: list[StepSequence]

    @property
    def full(self) -> bool:
        """Whether a token more needs ``grow``."""
        ...

    def takes(self, prompt: StepPrompt) -> bool:
        """Say whether a sequence after ``prompt`` may join."""
        ...

    def settle(self) -> None:
        """Close the gaps that sequences left; others may join and be decoded only then."""
        ...

    def add(self, prompt: StepPrompt) -> StepSequence:
        """Begin a sequence after a prompt that is read."""
        ...

    def grow(self) -> None:
        """Make room for more tokens."""
        ...

    def decode(self, run: CausalPass, tokens: Sequence[int]) -> Tensor:
        """Read one token for each member; give logits (members, vocabulary)."""
        ...

    def remove(self, sequence: StepSequence) -> None:
        """Let go of a sequence; no tensor is written to, so this may happen outside the inference mode."""
        ...

    def read(self, sequence: StepSequence) -> State | None:
        """View what is kept of a sequence, or give None where that is impossible."""
        ...


class Group:
    """Sequences of one adapter that share every pass."""

    def __init__(self, adapter: FrozenAdapter | None, like: State) -> None:
        self.adapter = adapter
        self.members: list[StepSequence] = []
        self._rows: list[StepSequence | None] = []  # as they lie in the cache; None: it left
        self._cache = PaddedCache(like)

    @property
    def full(self) -> bool:
        """Whether a token more needs ``grow``."""
        return self._cache.full

    def takes(self, prompt: StepPrompt) -> bool:
        """Say whether it is for the same adapter, and no row would be mostly padding then."""
        lengths = [len(prompt.tokens), *(member.length for member in self.members)]
        return prompt.adapter is self.adapter and max(lengths) <= _PADDING + 2 * min(lengths)

    def settle(self) -> None:
        """Move the last rows into the gaps that others left."""
        while None in self._rows:
            last = self._rows.pop()
            if last is not None:
                hole = self._rows.index(None)
                self._cache.move(len(self._rows), hole)
                self._rows[hole] = last
        self.members = [member for member in self._rows if member is not None]

    def add(self, prompt: StepPrompt) -> StepSequence:
        """Begin a sequence after a prompt that is read, with a copy of its state."""
        self.settle()
        row, length = len(self.members), len(prompt.tokens)
        self._hold()
        self._cache.reserve(row + 1, length)
        self._cache.place(row, prompt.state)
        sequence = StepSequence(self.adapter, length, self)
        self._rows.append(sequence)
        self.members.append(sequence)
        return sequence

    def grow(self) -> None:
        """Make room for more tokens, and give back what those who left do not need any more."""
        self.settle()
        if self.full:
            self._hold()
            self._cache.reserve(len(self.members), 0)

    def decode(self, run: CausalPass, tokens: Sequence[int]) -> Tensor:
        """Read one token for each member; give logits (members, vocabulary)."""
        lengths = self._hold()
        rows = [[token] for token in tokens]
        logits, _ = run(rows, self.adapter, self._cache, more=self._cache.arguments(lengths))
        for member in self.members:
            member.length += 1
        return logits[:, -1]

    def remove(self, sequence: StepSequence) -> None:
        """Leave a gap where the sequence was."""
        self._rows[self._rows.index(sequence)] = None
        self.members.remove(sequence)

    def read(self, sequence: StepSequence) -> State:
        """View the keys and values of a sequence."""
        return self._cache.read(self._rows.index(sequence), sequence.length)

    def _hold(self) -> list[int]:
        lengths = [member.length for member in self.members]
        self._cache.hold(lengths)
        return lengths


class Single:
    """One sequence with a cache of whatever kind the model made."""

    full = False  # these caches grow by themselves

    def __init__(self, adapter: FrozenAdapter | None) -> None:
        self.adapter = adapter
        self.members: list[StepSequence] = []
        self._cache: Any = None

    def takes(self, prompt: StepPrompt) -> bool:
        """Take nobody beside the one."""
        del prompt
        return False

    def settle(self) -> None:
        """Do nothing: there are no gaps."""

    def add(self, prompt: StepPrompt) -> StepSequence:
        """Begin the sequence after a prompt that is read, with a copy of its cache."""
        self._cache = copy.deepcopy(prompt.cache)
        self.members = [StepSequence(self.adapter, len(prompt.tokens), self)]
        return self.members[0]

    def grow(self) -> None:
        """Do nothing: these caches grow by themselves."""

    def decode(self, run: CausalPass, tokens: Sequence[int]) -> Tensor:
        """Read the token; give logits (1, vocabulary)."""
        logits, self._cache = run([tokens], self.adapter, self._cache)
        self.members[0].length += 1
        return logits[:, -1]

    def remove(self, sequence: StepSequence) -> None:
        """Let go of the sequence."""
        self.members.remove(sequence)

    def read(self, sequence: StepSequence) -> None:
        """Give nothing: what a cache holds differs from model to model."""
        del sequence
