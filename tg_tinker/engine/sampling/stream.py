"""One request on its way: what it has so far, and when it has enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tg_tinker.engine.sampling.detokenize import TextStream
from tg_tinker.engine.sampling.generation import Generation
from tg_tinker.engine.sampling.random_stream import RandomStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from tg_tinker.engine.sampling.decoder import DecodingSequence
    from tg_tinker.engine.sampling.generation import FinishReason, GenerationRequest, Listener, TopLogprobs
    from tg_tinker.engine.sampling.prefill import PrefillJob

__all__ = ["Stream"]


class Stream:
    """A request, its listener and its output; it waits, is in a prefill job, or has a sequence."""

    def __init__(
        self,
        handle: int,
        request: GenerationRequest,
        listener: Listener,
        *,
        limit: int,
        eos: frozenset[int],
        decode: Callable[[list[int]], str],
    ) -> None:
        """Take what it is about; ``limit`` tokens are the most it gets."""
        self.handle = handle
        self.request = request
        self.listener = listener
        self.tokens: list[int] = []
        self.prompt_logprobs: tuple[float | None, ...] | None = None
        self.topk_prompt_logprobs: tuple[TopLogprobs | None, ...] | None = None
        self.job: PrefillJob | None = None
        self.sequence: DecodingSequence | None = None
        self.ended = False
        self._limit = limit
        self._eos = eos
        self._logprobs: list[float] = []
        self._text = TextStream(decode, request.stop)
        self._pieces: list[str] = []
        self._random = RandomStream(request.seed)

    def __repr__(self) -> str:
        """Where it stands."""
        place = "ended" if self.ended else "running" if self.sequence else "reading" if self.job else "waiting"
        return f"<Stream {self.handle} {place}, {len(self.tokens)} of {self._limit} tokens>"

    @property
    def remaining(self) -> int:
        """How many more tokens it may get."""
        return self._limit - len(self.tokens)

    def uniform(self) -> float:
        """Give the random number that its next token is drawn with."""
        return self._random.at(len(self.tokens))

    def take(self, token: int, logprob: float) -> tuple[str, FinishReason | None]:
        """Add a token; give the text that became certain and, when this was the last one, why."""
        self.tokens.append(token)
        self._logprobs.append(logprob)
        reason: FinishReason | None = None
        piece = ""
        if token in self.request.stop_token_ids:
            reason = "stop"
        elif token in self._eos:
            reason = "eos"
        else:
            piece = self._text.push(token)
            if not self._text.stopped and not self.remaining:
                reason = "length"
        if reason:
            piece += self._text.rest()
        if self._text.stopped:
            reason = "stop"
        self._pieces.append(piece)
        return piece, reason

    def generation(self, reason: FinishReason) -> Generation:
        """Give everything, at the end."""
        return Generation(
            tokens=tuple(self.tokens),
            logprobs=tuple(self._logprobs),
            text="".join(self._pieces),
            finish_reason=reason,
            prompt_logprobs=self.prompt_logprobs,
            topk_prompt_logprobs=self.topk_prompt_logprobs,
        )
