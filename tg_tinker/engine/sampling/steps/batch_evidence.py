"""Whether sequences may share the passes of a model: tried on the model itself, not looked up in a list of names.

What is tried: prompts padded behind, a prompt in two pieces, rows padded in front, tokens far along beside near ones,
and going on after more tokens than a sliding window holds. Each must give the logits of the plain passes that it
replaces.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tg_tinker.engine.sampling.decoder import Chunk
from tg_tinker.engine.sampling.steps.causal_pass import CausalPass
from tg_tinker.engine.sampling.steps.padded_cache import PaddedCache
from tg_tinker.engine.sampling.steps.prompt_reading import read_together
from tg_tinker.engine.sampling.steps.step_groups import StepPrompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.sampling.steps.padded_cache import State

__all__ = ["objection"]

_LENGTHS = (3, 9)  # tokens of the prompts that are tried
_BEYOND = 3  # tokens that a sliding window has moved on by
_KINDS = {"full_attention", "sliding_attention"}


class _ObjectionError(Exception):
    """Something speaks against it."""


@torch.inference_mode()
def objection(base: BaseModel) -> str | None:
    """Say why every sequence needs passes of its own, or None where they can be shared. A dozen short passes."""
    if base.max_length < max(_LENGTHS) + 1:
        return f"{base.max_length} tokens are too few to try it"
    try:
        _Trial(base).all()
    except _ObjectionError as error:
        return str(error)
    # As wide as it gets: a model may raise anything about arguments that it was not made for, and one sequence after
    # another is always right.
    except Exception as error:  # noqa: BLE001 - see above
        reason = next(iter(str(error).splitlines()), "")
        return f"a trial raised {type(error).__name__}: {reason}"
    return None


class _Trial:
    """The prompts, what plain passes make of them, and what shared ones do."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._run = CausalPass(base)
        self._random = torch.Generator().manual_seed(0)
        self._prompts = [self._tokens(length) for length in _LENGTHS]
        self._spread = math.nan  # of the logits, from token to token
        self._noises: dict[tuple[int, ...], Tensor] = {}

    def all(self) -> None:
        """Try everything. Raises ``_ObjectionError`` with the first that speaks against it."""
        plain = [self._run([tokens], None, None) for tokens in self._prompts]
        logits = [rows[0] for rows, _ in plain]
        caches = [cache for _, cache in plain]
        _check_kind(caches[0], self._base.model.config)
        self._spread = float(torch.cat(logits).float().std(0).square().mean().sqrt())
        states = self._read(logits)
        self._decode(caches, states)
        self._decode_far(states)
        for window in _windows(caches[0], self._base.max_length - 2):
            self._go_on_long(window, states[0])

    def _read(self, expected: Sequence[Tensor]) -> list[State]:
        """Read both prompts in one pass, and the longer one in two pieces; give what is kept of them."""
        prompts = [StepPrompt(tokens, None) for tokens in self._prompts]
        chunks = [Chunk(prompt, len(prompt.tokens), len(prompt.tokens)) for prompt in prompts]
        for own, logits in zip(read_together(self._run, chunks), expected, strict=True):
            self._compare(own, logits, "prompts in one pass")
        pieces = StepPrompt(self._prompts[1], None)
        for count in (4, len(pieces.tokens) - 4):
            (own,) = read_together(self._run, [Chunk(pieces, count, count)])
            self._compare(own, expected[1][pieces.done - count : pieces.done], "a prompt in two pieces")
        return [prompt.state for prompt in prompts]

    def _decode(self, caches: Sequence[Any], states: Sequence[State]) -> None:
        """Read a token after each prompt, alone and in passes that rows of unequal or of equal length share."""
        tokens = [self._tokens(1), self._tokens(1)]
        pairs = zip(tokens, caches, strict=True)
        expected = torch.cat([self._run([token], None, cache)[0] for token, cache in pairs])
        own = self._step(self._cache(states), tokens, _LENGTHS)
        self._compare(own, expected, "rows padded in front")
        own = self._step(self._cache([states[1]] * 2), [tokens[1]] * 2, [_LENGTHS[1]] * 2)
        self._compare(own, expected[1:].expand_as(own), "rows of one length")

    def _decode_far(self, states: Sequence[State]) -> None:
        """Read a token at the last position that the model has beside one near the beginning."""
        positions = torch.tensor([[self._base.max_length - 1], [_LENGTHS[1]]], device=self._base.device)
        tokens = [self._tokens(1), self._tokens(1)]
        alone = [
            self._step(self._cache([state]), [token], [length], position_ids=position[None])
            for state, token, length, position in zip(states, tokens, _LENGTHS, positions, strict=True)
        ]
        own = self._step(self._cache(states), tokens, _LENGTHS, position_ids=positions)
        self._compare(own, torch.cat(alone), "rows far from one another")

    def _go_on_long(self, length: int, other: State) -> None:
        """Read two tokens after ``length`` made-up ones: beside a short row, alone, and as a piece of a prompt."""
        tokens = self._tokens(2)
        state = [(self._noise(keys, length), self._noise(values, length)) for keys, values in other]
        expected = self._one_by_one(state, tokens)
        own = self._step(self._cache([state, other]), [tokens[:1]] * 2, [length, _LENGTHS[0]])
        self._compare(own[0], expected[:1], "a row longer than the sliding window")
        own = self._step(self._cache([state]), [tokens[:1]], [length])
        self._compare(own[0], expected[:1], "rows longer than the sliding window")
        prompt = StepPrompt((0,) * length + tokens, None, done=length, state=state)
        (piece,) = read_together(self._run, [Chunk(prompt, 2, 2)])
        self._compare(piece, expected, "a prompt in pieces beyond the sliding window")

    def _one_by_one(self, state: State, tokens: Sequence[int]) -> Tensor:
        """Read tokens after a state with the model's own cache; give logits (tokens, vocabulary)."""
        cache = DynamicCache(config=self._base.model.config)
        for index, (keys, values) in enumerate(state):
            cache.update(keys[None], values[None], index)
        return torch.cat([self._run([[token]], None, cache)[0][0] for token in tokens])

    def _cache(self, states: Sequence[State]) -> PaddedCache:
        cache = PaddedCache(states[0])
        lengths: list[int] = []
        for row, state in enumerate(states):
            cache.hold(lengths)
            lengths.append(state[0][0].shape[1])
            cache.reserve(row + 1, lengths[-1])
            cache.place(row, state)
        return cache

    def _step(
        self, cache: PaddedCache, tokens: Sequence[Sequence[int]], lengths: Sequence[int], **other: Tensor
    ) -> Tensor:
        cache.hold(lengths)
        return self._run(tokens, None, cache, more=cache.arguments(lengths) | other)[0]

    def _compare(self, own: Tensor, expected: Tensor, what: str) -> None:
        """Refuse logits (..., vocabulary) that differ in more than half the digits of their dtype, row by row."""
        error = (own.float() - expected.float()).square().mean(-1).sqrt()
        worst = float(error.max())
        if not worst <= torch.finfo(expected.dtype).eps ** 0.5 * self._spread:  # NaN is refused as well
            raise _ObjectionError(f"{what} gave other logits, by {worst:.1e} where a token changes {self._spread:.1e}")

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(self._base.vocab_size, (count,), generator=self._random).tolist())

    def _noise(self, like: Tensor, count: int) -> Tensor:
        """Make up keys or values (heads, count, size); all of one shape are the same, for they may be large."""
        shape = (like.shape[0], count, like.shape[2])
        if shape not in self._noises:
            self._noises[shape] = torch.randn(shape, generator=self._random).to(like.device, like.dtype)
        return self._noises[shape]


def _check_kind(cache: Any, config: Any) -> None:
    """Refuse caches that are no plain keys and values, token by token."""
    if type(cache) is not DynamicCache:
        raise _ObjectionError(f"its cache is a {type(cache).__name__}")
    layers: list[Any] = cache.layers
    kinds = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        raise _ObjectionError(f"its cache has layers of the kind {min(kind.__name__ for kind in kinds)}")
    attention = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or _KINDS) - _KINDS
    if attention:
        raise _ObjectionError(f"it has layers of the kind {min(attention)}")
    if not all(layer.is_initialized for layer in layers):
        raise _ObjectionError("some of its layers keep nothing")


def _windows(cache: Any, longest: int) -> list[int]:
    """Give lengths at which sliding windows have moved on, at most ``longest``."""
    windows = {layer.sliding_window for layer in cache.layers if type(layer) is DynamicSlidingWindowLayer}
    return sorted(min(window + _BEYOND, longest) for window in windows if window <= longest)
