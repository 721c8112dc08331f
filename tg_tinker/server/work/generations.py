"""Completions of one request, from the engine's listeners to whoever waits on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import FutureCancelledError, TGTinkerError
from tg_tinker.server.work.operations import Detached, Done
from tg_tinker.server.work.scheduler import Scheduler, settle, tell

if TYPE_CHECKING:
    from tg_tinker.engine.sampling.generation import Generation, GenerationRequest
    from tg_tinker.engine.sampling.sampler import Sampler

_GOLDEN = 0x9E3779B97F4A7C15  # spreads the streams of one request's completions over all seeds
_SEEDS = 1 << 63

#: index of the completion, token, its logprob, newly decided text
OnToken = Callable[[int, int, float, str], None]


@attrs.frozen
class Completion:
    """A finished generation and how long it took from the request's start, in milliseconds."""

    generation: Generation
    latency_ms: float


def seed_of(seed: int, index: int) -> int:
    """The seed of a request's completion number ``index``; number 0 keeps the request's own."""
    return (seed + index * _GOLDEN) % _SEEDS


class Generations(Detached["list[Completion]"]):
    """Several completions sampled side by side; they end, fail and are cancelled together."""

    def __init__(
        self, sampler: Sampler, requests: Sequence[GenerationRequest], on_token: OnToken | None = None
    ) -> None:
        self._sampler = sampler
        self._requests = requests
        self._on_token = on_token
        self._handles: dict[int, int] = {}
        self._finished: dict[int, Completion] = {}
        self._done: Done | None = None
        self._begun = 0.0

    def begin(self, done: Done) -> None:
        """Submit them all; one that is refused ends all."""
        self._done, self._begun = done, monotonic()
        try:
            for index, request in enumerate(self._requests):
                self._handles[index] = self._sampler.submit(request, _Listener(self, index))
        # The device thread serves everybody: whatever a sampler raises is this request's outcome and nobody else's.
        except Exception as error:  # noqa: BLE001
            self.failed(error)

    def cancel(self) -> None:
        """Free every slot that is still in use."""
        self.failed(FutureCancelledError("the sampling was cancelled"))

    def token(self, index: int, token: int, logprob: float, text: str) -> None:
        """Pass a token on, where somebody listens to tokens."""
        if self._on_token is not None and self._done is not None:
            self._on_token(index, token, logprob, text)

    def finished(self, index: int, generation: Generation) -> None:
        """Keep a completion; the last one ends the request."""
        self._handles.pop(index, None)
        self._finished[index] = Completion(generation, (monotonic() - self._begun) * 1e3)
        if len(self._finished) == len(self._requests):
            self._end([self._finished[i] for i in range(len(self._requests))], None)

    def failed(self, error: BaseException) -> None:
        """End the request badly."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            self._sampler.cancel(handle)
        self._end(None, error)

    def _end(self, result: Any, error: BaseException | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(result, error)


class _Listener:
    """Hears of one completion on the device thread."""

    def __init__(self, group: Generations, index: int) -> None:
        self._group = group
        self._index = index

    def on_token(self, token_id: int, logprob: float, text: str) -> None:
        self._group.token(self._index, token_id, logprob, text)

    def on_done(self, generation: Generation) -> None:
        self._group.finished(self._index, generation)

    def on_error(self, error: TGTinkerError) -> None:
        self._group.failed(error)


async def generate(scheduler: Scheduler, group: Generations) -> list[Completion]:
    """Run a request's completions outside any run's order; a caller that goes away frees their slots."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[Completion]] = loop.create_future()

    scheduler.post(lambda: group.begin(lambda result, error: tell(loop, settle, future, result, error)))
    try:
        return await future
    except asyncio.CancelledError:
        scheduler.post(group.cancel)
        raise
