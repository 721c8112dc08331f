"""Continuous batching: requests join and leave between tokens, whatever adapter they are for.

One tick gives every running request one token, then reads a piece of the prompts that wait. Everything runs on the one
device thread, so there is no lock and nothing to await; who calls ``step``, and when, is the caller's affair.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from tg_tinker.engine import memory
from tg_tinker.engine.sampling import failures, generation
from tg_tinker.engine.sampling.decoder import Chunk
from tg_tinker.engine.sampling.detokenize import decoder_of
from tg_tinker.engine.sampling.generation import Generation, GenerationRequest, Listener
from tg_tinker.engine.sampling.prefill import PrefillJob, pace, share_out, tokens_a_tick
from tg_tinker.engine.sampling.prefix_cache import PrefixCache
from tg_tinker.engine.sampling.sampling_batch import SamplingBatch
from tg_tinker.engine.sampling.slots import fused_weights
from tg_tinker.engine.sampling.slots.routed_decoder import RoutedDecoder
from tg_tinker.engine.sampling.steps.step_decoder import StepDecoder
from tg_tinker.engine.sampling.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.sampling.decoder import Decoder, DecodingSequence, Prompt
    from tg_tinker.engine.sampling.generation import FinishReason

__all__ = ["Generation", "GenerationRequest", "Listener", "Sampler"]

T = TypeVar("T")
Drawn = tuple["Sequence[Stream]", list[int], list[float]]  # streams, and a token and a logprob for each

logger = logging.getLogger("tg_tinker.engine.sampling.sampler")

_ROOM_AHEAD = 64  # tokens that a sequence gets room for when it begins
_MEBIBYTE = 1 << 20


class Sampler:
    """Makes tokens for many requests on one base model, every run and version of it at once."""

    def __init__(
        self,
        base: BaseModel,
        *,
        slots: int = 64,
        max_length: int | None = None,
        prefix_cache_bytes: int = 256 * _MEBIBYTE,
    ) -> None:
        """Serve ``base``, at most ``slots`` requests at a time; more wait in the order in which they came.

        Raises:
            InvalidRequestError: when the model cannot be sampled from.

        """
        self._base = base
        self._slots = slots
        self._max_length = min(max_length or base.max_length, base.max_length)
        if fused_weights.unsupported(base.model) is None:
            self._decoder: Decoder = RoutedDecoder(base, max_length=self._max_length)
        else:
            self._decoder = StepDecoder(base)
        head = cast("nn.Linear", base.model.get_output_embeddings())
        self._vocab_size = head.weight.shape[0]  # columns of the logits
        self._pace = pace(base.model.num_parameters(), base.device)
        self._text_of = decoder_of(base.tokenizer)
        self._prefixes = PrefixCache(prefix_cache_bytes if self._decoder.reuses_prefixes else 0)
        self._streams: dict[int, Stream] = {}  # all that are neither finished nor cancelled, by handle
        self._waiting: deque[Stream] = deque()
        self._jobs: list[PrefillJob] = []
        self._running: dict[DecodingSequence, Stream] = {}
        self._batch: SamplingBatch | None = None
        self._batch_of: tuple[DecodingSequence, ...] = ()
        self._next_handle = 1

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._streams)

    def submit(self, request: GenerationRequest, listener: Listener) -> int:
        """Take a request; its listener hears of it during later steps. Gives a handle for ``cancel``.

        Raises:
            InvalidRequestError: naming the field and what was expected.

        """
        generation.check(request, vocab_size=self._base.vocab_size, max_length=self._max_length)
        handle = self._next_handle
        self._next_handle += 1
        limit = min(request.max_tokens, self._max_length - len(request.prompt))
        stream = Stream(handle, request, listener, limit=limit, eos=self._base.eos_token_ids, decode=self._text_of)
        self._streams[handle] = stream
        self._waiting.append(stream)
        return handle

    def cancel(self, handle: int) -> bool:
        """End a request and free its place at once; its listener hears nothing more. False: it had ended already."""
        stream = self._streams.get(handle)
        if stream is None:
            return False
        self._end(stream)
        return True

    @torch.inference_mode()  # over all of it: a tensor made in this mode may not be written to outside
    def step(self) -> None:
        """Do one tick: a token for every running request, then a piece of the prompts that wait."""
        self._decode()
        self._admit()
        self._prefill()

    def _decode(self) -> None:
        """Give every running stream a token."""
        running = list(self._running.values())
        for sequence in self._attempt(running, self._decoder.crowded) or ():
            if sequence in self._running:  # it may have ended with another of its request that could not grow
                self._attempt([self._running[sequence]], partial(self._decoder.grow, sequence))
        if self._running:
            self._deliver(self._attempt(list(self._running.values()), self._next_tokens))

    def _next_tokens(self) -> Drawn:
        sequences = self._decoder.batch()
        if self._batch is None or sequences is not self._batch_of:
            self._batch = self._settings_of([self._running[sequence] for sequence in sequences])
            self._batch_of = sequences
        streams = self._batch.streams
        return streams, *self._batch.sample(self._decoder.decode([stream.tokens[-1] for stream in streams]))

    def _settings_of(self, streams: Sequence[Stream]) -> SamplingBatch:
        return SamplingBatch(streams, self._vocab_size, self._base.device)

    def _admit(self) -> None:
        """Give waiting streams a place, oldest first; equal prompts of one adapter are read once."""
        while self._waiting and len(self._streams) - len(self._waiting) < self._slots:
            stream = self._waiting.popleft()
            job = next((job for job in self._jobs if job.takes(stream.request)), None)
            if job is None:
                self._attempt([stream], partial(self._open, stream))
            else:
                job.streams.append(stream)
                stream.job = job

    def _open(self, stream: Stream) -> None:
        request = stream.request
        known = None
        if not request.scores_prompt:
            known = self._prefixes.find(request.prompt, request.adapter, request.cache_key)
        stream.job = PrefillJob(self._decoder.open(request.prompt, request.adapter, known), stream)
        self._jobs.append(stream.job)

    def _prefill(self) -> None:
        """Read a piece of the prompts that wait; those that are read whole get their first token and a sequence."""
        if not self._jobs:
            return
        budget = tokens_a_tick(self._pace, reading=len(self._jobs), running=len(self._running))
        shares = share_out(self._jobs, budget, whole=self._decoder.whole_prompts)
        streams = [stream for job, _ in shares for stream in job.streams]
        complete = self._attempt(streams, lambda: self._read(shares))
        if complete:
            self._begin(complete)

    def _read(self, shares: Sequence[tuple[PrefillJob, int]]) -> list[tuple[PrefillJob, Tensor]]:
        """Read the chunks; give the jobs that are complete, each with the logits (1, V) after its prompt."""
        chunks = [_chunk(job, count) for job, count in shares]
        before = [chunk.prompt.done for chunk in chunks]
        parts = self._decoder.prefill(chunks).split([chunk.wanted for chunk in chunks])
        for (job, _), rows, done in zip(shares, parts, before, strict=True):
            if job.scored and not job.score(rows, done):
                self._fail(job.streams, failures.not_finite())
        return [(job, rows[-1:]) for (job, _), rows in zip(shares, parts, strict=True) if job.complete]

    def _begin(self, complete: Sequence[tuple[PrefillJob, Tensor]]) -> None:
        """Give every stream of the jobs its first token and, where more may follow, a sequence."""
        drawing: list[Stream] = []
        rows: list[Tensor] = []
        for job, logits in complete:
            self._jobs.remove(job)
            job.hand_out()
            self._remember(job.streams[0].request, job.prompt.tokens, job.prompt)
            wanting = [stream for stream in job.streams if stream.remaining]
            drawing += wanting
            rows.append(logits.expand(len(wanting), -1))
        if drawing:
            self._deliver(self._attempt(drawing, lambda: self._draw(drawing, torch.cat(rows))))
        for job, _ in complete:
            for stream in list(job.streams):
                if stream.ended:
                    continue  # with another of its request that found no room
                if not stream.remaining:
                    self._finish(stream, "length")
                else:
                    self._attempt([stream], partial(self._join, job.prompt, stream))

    def _draw(self, streams: Sequence[Stream], logits: Tensor) -> Drawn:
        batch = self._settings_of(streams)
        return batch.streams, *batch.sample(logits)

    def _join(self, prompt: Prompt, stream: Stream) -> None:
        stream.sequence = self._decoder.join(prompt, min(stream.remaining, _ROOM_AHEAD))
        stream.job = None
        self._running[stream.sequence] = stream

    def _deliver(self, drawn: Drawn | None) -> None:
        """Hand out a token each; what a listener does or raises concerns its own stream only."""
        for stream, token, logprob in zip(*drawn, strict=True) if drawn else ():
            if stream.ended:
                continue  # a listener of this very tick cancelled it
            if math.isnan(logprob):
                self._fail([stream], failures.not_finite())
                continue
            taken = self._attempt([stream], partial(stream.take, token, logprob))
            if taken:
                piece, reason = taken
                self._tell(stream, stream.listener.on_token, token, logprob, piece)
                if reason and not stream.ended:
                    self._finish(stream, reason)

    def _finish(self, stream: Stream, reason: FinishReason) -> None:
        if stream.sequence is not None:
            tokens = (*stream.request.prompt, *stream.tokens[:-1])  # the last one was never read
            self._remember(stream.request, tokens, stream.sequence)
        self._end(stream)
        self._tell(stream, stream.listener.on_done, stream.generation(reason))

    def _remember(self, request: GenerationRequest, tokens: tuple[int, ...], source: Prompt | DecodingSequence) -> None:
        """Keep what was read for prompts that go on from it."""
        if not self._prefixes.enabled:
            return
        try:
            state = self._decoder.read(source)
            if state is not None:
                self._prefixes.put(tokens, state, request.adapter, request.cache_key)
        # As wide as it gets: a cache is the first thing to give up, above all when memory is short.
        except Exception as error:  # noqa: BLE001 - see above
            logger.warning("the prefix cache is emptied: %s", failures.trace(error))
            self._prefixes.clear()

    def _end(self, stream: Stream) -> None:
        """Let go of a stream and of everything it holds."""
        stream.ended = True
        del self._streams[stream.handle]
        if stream.sequence is not None:
            del self._running[stream.sequence]
            self._decoder.leave(stream.sequence)
            self._batch, self._batch_of, stream.sequence = None, (), None
        elif stream.job is not None:
            stream.job.streams.remove(stream)
            if not stream.job.streams and stream.job in self._jobs:
                self._jobs.remove(stream.job)
        elif stream in self._waiting:
            self._waiting.remove(stream)

    def _attempt(self, streams: Sequence[Stream], work: Callable[[], T]) -> T | None:
        """Do what these streams need; when it fails, they fail and nobody else."""
        try:
            return work()
        # As wide as it gets: whatever the model raises must reach those who wait for it, and the others must go on.
        except Exception as error:  # noqa: BLE001 - see above
            logger.warning("sampling failed for %d requests: %s", len(streams), failures.trace(error))
            if memory.is_exhausted(error):
                self._prefixes.clear()
            self._fail(streams, error)
            return None

    def _fail(self, streams: Sequence[Stream], error: Exception) -> None:
        for stream in list(streams):
            if not stream.ended:
                self._end(stream)
                self._tell(stream, stream.listener.on_error, failures.typed(error))

    def _tell(self, stream: Stream, hear: Callable[..., None], *news: Any) -> None:
        """Tell a listener; where that fails, its request has failed, and it is told so instead."""
        try:
            hear(*news)
        # As wide as it gets: a listener is foreign code, and its failure is no other request's affair.
        except Exception as error:  # noqa: BLE001 - see above
            logger.warning("request %d is dropped: its listener failed: %s", stream.handle, failures.trace(error))
            if not stream.ended:
                self._end(stream)
            if hear != stream.listener.on_error:
                self._tell(stream, stream.listener.on_error, failures.typed(error))


def _chunk(job: PrefillJob, count: int) -> Chunk:
    last = count == job.prompt.remaining
    return Chunk(job.prompt, count, wanted=count if job.scored else int(last))
