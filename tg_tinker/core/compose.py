"""Operations made of an accepted one and what follows it: publish weights, wait for the sampler, give a client.

What follows starts when the first is done, whether or not anybody waits. It returns a value; the facade made it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from tg_tinker.bridge import Job
from tg_tinker.core.call import Composed
from tg_tinker.core.lane import Place
from tg_tinker.core.operation import left_open
from tg_tinker.core.run import RunCore
from tg_tinker.errors import (
    AuthenticationError,
    AuthorizationError,
    ClientClosedError,
    ResourceNotFoundError,
    SamplerNotReadyError,
    ServerRestartedError,
    TGTinkerError,
)
from tg_tinker.futures import OperationFuture
from tg_tinker.threads.caller import called_at

__all__ = ["SAMPLER_CEILING", "compose", "wait_for_version"]

R = TypeVar("R")
SAMPLER_CEILING = 600.0  # seconds from the end of the publish until a sampler must serve the version
_HOLD = 30.0  # seconds that the sampler may hold its answer
_PAUSES = (0.05, 1.0)  # seconds between questions to a sampler that does not hold: the first, the longest
_FINAL = (AuthenticationError, AuthorizationError, ClientClosedError, ServerRestartedError)


class _Composition(Generic[R]):
    """Behind the future of a composed operation: its first part, then a coroutine of its own."""

    def __init__(self, first: OperationFuture[Any]) -> None:
        self.first = first

    def wake(self, _: OperationFuture[Any]) -> None:
        """Nothing to do: it is on its way whether or not anybody waits."""

    async def cancel(self, _: OperationFuture[Any]) -> bool:
        """Cancel the first part, if that is still possible."""
        return await self.first.cancel_async()


def compose(run: RunCore, plan: Composed[R]) -> OperationFuture[R]:
    """Submit the first part now, and carry on at home as soon as it is done."""
    first = run.start(plan.first)
    place = run.lane.take() if plan.keeps_a_place else None
    label = first.label.replace(first.operation, plan.operation, 1)
    future: OperationFuture[R] = OperationFuture(run.home, _Composition(first), operation=plan.operation, label=label)
    job = run.home.spawn(_carry_on(first, plan, future, place), name=plan.operation, group=run.tasks)
    job.ended.when_set(lambda: _after(job, future, place))
    return future


async def _carry_on(
    first: OperationFuture[Any], plan: Composed[R], future: OperationFuture[R], place: Place | None
) -> None:
    if await first.until_answered():
        future.accept(first.id)
    result = await first
    with called_at(plan.first.site):
        future.settle(await (plan.then(result) if place is None else plan.then(result, place)))


def _after(job: Job[None], future: OperationFuture[R], place: Place | None) -> None:
    error = job.error()
    if place is not None:
        if error is not None:
            place.refuse(future.operation)  # it was kept for a gradient, which is not to come
        place.leave()
    if error is not None:
        future.fail(left_open(error))


async def wait_for_version(
    serving: Callable[[float], Awaitable[int]], version: int, *, ceiling: float = SAMPLER_CEILING
) -> None:
    """Wait until ``serving(hold)``, the version that the sampler serves, has reached ``version``.

    ``hold`` is how many seconds the sampler may wait with its answer. Raises ``SamplerNotReadyError`` after ``ceiling``
    seconds; a sampler that cannot be reached meanwhile is asked again, one that is gone for good is not.
    """
    started = asyncio.get_running_loop().time()
    pause, seen, trouble = _PAUSES[0], -1, ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ceiling):
            while True:
                left = ceiling - (asyncio.get_running_loop().time() - started)
                try:
                    seen = await serving(max(0.0, min(_HOLD, left)))
                except TGTinkerError as error:
                    if _is_final(error):
                        raise
                    trouble = f"; the last answer was: {error}"
                if seen >= version:
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, _PAUSES[1])
    message = f"no sampler served version {version} within {ceiling:g} s (the newest seen was {seen}){trouble}"
    raise SamplerNotReadyError(message, version=version, waited=ceiling)


def _is_final(error: TGTinkerError) -> bool:
    """Whether asking again is no use; a 404 without a code may come from a proxy before the sampler is up."""
    gone = isinstance(error, ResourceNotFoundError) and error.resource_type is not None
    return gone or isinstance(error, _FINAL)
