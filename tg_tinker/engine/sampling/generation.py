"""The values of sampling: what is asked for, what comes back, and who listens while it is made.

A request is checked here, once, against the model it is for. Nothing here computes; how tokens are made is in
``sampler``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs

from tg_tinker.engine.requirements import require
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.errors import TGTinkerError

__all__ = ["FinishReason", "Generation", "GenerationRequest", "Listener", "TopLogprobs", "check"]

FinishReason = Literal["length", "stop", "eos"]
TopLogprobs = tuple[tuple[int, float], ...]  # (token id, logprob), the most probable first


@attrs.frozen(eq=False)
class GenerationRequest:
    """One completion of one prompt."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int  # the random stream: token ``i`` is drawn with number ``i`` of it, whatever else is running
    adapter: FrozenAdapter | None = None  # None: the base model alone
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int | None = None  # None and 0: off
    stop: tuple[str, ...] = ()  # texts, not part of the text that comes back
    stop_token_ids: frozenset[int] = frozenset()
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    cache_key: str | None = None  # prompts share cached state only where adapter and this key are the same

    @property
    def scores_prompt(self) -> bool:
        """Whether anything is asked about the prompt itself."""
        return self.prompt_logprobs or self.topk_prompt_logprobs > 0


@attrs.frozen
class Generation:
    """A finished completion.

    ``logprobs`` are log-softmax of the model's logits over the temperature, before penalties, top-k and top-p; at
    temperature 0 over 1. Those of the prompt are always over 1, and their first entry is None.
    """

    tokens: tuple[int, ...]  # a stop or end token included
    logprobs: tuple[float, ...]
    text: str  # stop texts, stop tokens and end tokens excluded
    finish_reason: FinishReason
    prompt_logprobs: tuple[float | None, ...] | None = None
    topk_prompt_logprobs: tuple[TopLogprobs | None, ...] | None = None


class Listener(Protocol):
    """Hears of one request's progress, on the device thread; what it raises ends its own request only."""

    def on_token(self, token_id: int, logprob: float, text: str) -> None:
        """Take one token and the text that became certain with it (may be empty)."""

    def on_done(self, generation: Generation) -> None:
        """Take the whole completion, after its last token."""

    def on_error(self, error: TGTinkerError) -> None:
        """Take the reason why there will be no completion."""


def check(request: GenerationRequest, *, vocab_size: int, max_length: int) -> None:
    """Refuse a request that the model cannot serve.

    Raises:
        InvalidRequestError: naming the first wrong field and what was expected.

    """
    _check_prompt(request, vocab_size, max_length)
    least = 0 if request.scores_prompt else 1
    enough = _is_int(request.max_tokens) and request.max_tokens >= least
    require(enough, "max_tokens", f"an integer >= {least}", request.max_tokens)
    for field, constraint, holds in _RULES:
        value = getattr(request, field)
        require(holds(value), field, constraint, value)
    bounded = all(_is_int(token) and 0 <= token < vocab_size for token in request.stop_token_ids)
    require(bounded, "stop_token_ids", f"token ids from 0 to {vocab_size - 1}", request.stop_token_ids)
    most = request.topk_prompt_logprobs
    require(most <= vocab_size, "topk_prompt_logprobs", f"at most {vocab_size}", most)


def _check_prompt(request: GenerationRequest, vocab_size: int, max_length: int) -> None:
    room = max_length - (1 if request.max_tokens else 0)
    if not 1 <= len(request.prompt) <= room:
        message = (
            f"prompt has {len(request.prompt)} tokens; the model's length of {max_length} leaves room for 1 to {room}"
        )
        raise InvalidRequestError(message, field="prompt", constraint=f"1 to {room} tokens")
    for position, token in enumerate(request.prompt):
        if not (_is_int(token) and 0 <= token < vocab_size):
            message = f"prompt holds {token!r}, which is no token id of this model @ $.prompt[{position}]"
            raise InvalidRequestError(message, field="prompt", constraint=f"token ids from 0 to {vocab_size - 1}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("seed", "an integer from 0 up to, not including, 2**64", lambda v: _is_int(v) and 0 <= v < 1 << 64),
    ("temperature", "a number >= 0", lambda v: _is_number(v) and v >= 0),
    ("top_p", "a number above 0 and at most 1", lambda v: _is_number(v) and 0 < v <= 1),
    ("top_k", "None or an integer >= 0", lambda v: v is None or (_is_int(v) and v >= 0)),
    ("stop", "non-empty texts", lambda v: isinstance(v, tuple) and all(isinstance(text, str) and text for text in v)),
    ("repetition_penalty", "a number above 0", lambda v: _is_number(v) and v > 0),
    ("presence_penalty", "a finite number", _is_number),
    ("frequency_penalty", "a finite number", _is_number),
    ("topk_prompt_logprobs", "an integer >= 0", lambda v: _is_int(v) and v >= 0),
)
