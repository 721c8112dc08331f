"""What the sampler asks of a decoder: read prompts in chunks, then give logits for one more token of every sequence.

There are two: ``slots`` for the models whose pass we know, ``steps`` for all others. Neither samples; neither knows a
request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter

__all__ = ["Chunk", "Decoder", "DecodingSequence", "Prompt"]


@attrs.define(eq=False)
class Prompt:
    """A prompt that is being read: its first ``done`` tokens are."""

    tokens: tuple[int, ...]
    adapter: FrozenAdapter | None
    done: int = 0

    @property
    def remaining(self) -> int:
        """Tokens still to read."""
        return len(self.tokens) - self.done


@attrs.define(eq=False)
class DecodingSequence:
    """A sequence that gets a token at every call of ``decode``; ``length`` tokens of it are read."""

    adapter: FrozenAdapter | None
    length: int


@attrs.frozen(eq=False)
class Chunk:
    """The next ``count`` tokens of a prompt, and for how many of them, from the last one back, logits are wanted."""

    prompt: Prompt
    count: int
    wanted: int


class Decoder(Protocol):
    """Holds the state of every prompt and sequence; used by one thread."""

    whole_prompts: bool  # whether a prompt must be one chunk
    reuses_prefixes: bool  # whether ``open`` can start from a prefix

    def open(self, tokens: tuple[int, ...], adapter: FrozenAdapter | None, prefix: Tensor | None) -> Prompt:
        """Begin a prompt, its first tokens taken from ``prefix``, which ``read`` gave for the same adapter."""
        ...

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Read the chunks; give the wanted logits (sum of wanted, vocabulary) in their order."""
        ...

    def join(self, prompt: Prompt, expected: int) -> DecodingSequence:
        """Begin a sequence after a prompt that is read, as often as wanted; ``expected`` more tokens are likely."""
        ...

    def batch(self) -> tuple[DecodingSequence, ...]:
        """Give every sequence in the order of ``decode``; the same object while nothing joined or left."""
        ...

    def crowded(self) -> Sequence[DecodingSequence]:
        """Give the sequences that have no room for one more token: ``grow`` each before ``decode``."""
        ...

    def grow(self, sequence: DecodingSequence) -> None:
        """Make room for more tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Read one token for each sequence of ``batch``; give logits (B, vocabulary)."""
        ...

    def leave(self, sequence: DecodingSequence) -> None:
        """End a sequence and free its place at once."""
        ...

    def read(self, source: Prompt | DecodingSequence) -> Tensor | None:
        """Give the state after every token read so far, for ``open`` to start from; None where that is impossible."""
        ...
