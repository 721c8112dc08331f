"""Composed operations: publish, wait for the sampler, give the value."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from fixtures import faults
from fixtures.client import FORWARD_BACKWARD, OPTIM_STEP, Numbered, Toy
from fixtures.server import ScriptedServer

from tg_tinker import errors
from tg_tinker.core import compose
from tg_tinker.core.call import Composed, call
from tg_tinker.core.compose import wait_for_version
from tg_tinker.core.lane import Place
from tg_tinker.futures import OperationFuture


async def test_the_value_comes_when_the_version_is_served(server: ScriptedServer, either: Toy) -> None:
    """The future gives the value, its twin gives it directly."""
    future = either.publish("a")
    waiting = asyncio.ensure_future(future.result_async())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    server.served_version = 2
    assert await waiting == "a@1"
    assert future.id == "fut-1"
    assert repr(future) == "<OperationFuture publish fut-1: completed>"
    assert await either.publish_async("b") == "b@2"


async def test_it_goes_on_whether_or_not_anybody_waits(server: ScriptedServer, toy: Toy) -> None:
    """The clock of the sampler starts when the publish completes."""
    future = toy.publish("a", ceiling=0.2)
    while not future.outcome.settled:
        await asyncio.sleep(0.01)
    with pytest.raises(errors.SamplerNotReadyError) as caught:
        await future
    assert isinstance(caught.value, RuntimeError)
    assert (caught.value.version, caught.value.waited) == (1, 0.2)
    assert "no sampler served version 1 within 0.2 s" in str(caught.value)


async def test_a_timeout_bounds_only_the_wait(server: ScriptedServer, toy: Toy) -> None:
    """After a short wait the same future still gives the client."""
    future = toy.publish("a")
    with pytest.raises(errors.FutureTimeoutError):
        await future.result_async(timeout=0.05)
    server.served_version = 1
    assert await future == "a@1"


async def test_a_publish_that_fails_is_the_failure(server: ScriptedServer, toy: Toy) -> None:
    """Nothing follows a publish that was refused or failed."""
    server.faults["publish"].append(faults.status(403))
    with pytest.raises(errors.AuthorizationError):
        await toy.publish("a")
    server.failing["publish"] = {"code": "OPERATION_FAILED", "message": "disk full"}
    with pytest.raises(errors.OperationFailedError, match="disk full"):
        await toy.publish_async("a")


async def test_cancelling_cancels_the_publish(server: ScriptedServer, toy: Toy) -> None:
    """What is queued can be taken back; what is published cannot."""
    server.held.add("publish")
    future = toy.publish("a")
    assert await future.cancel_async()
    with pytest.raises(errors.FutureCancelledError):
        await future
    server.held.clear()
    other = toy.publish("b")
    while not other.id:
        await asyncio.sleep(0.01)
    assert not await other.cancel_async()
    server.served_version = 9
    assert (await other).startswith("b@")


def in_two_passes(toy: Toy, *, fails: bool = False) -> OperationFuture[int]:
    """A forward, a computation of the caller's, and a backward in the place that was kept for it."""

    async def then(seen: Numbered, place: Place) -> int:
        await asyncio.sleep(0.05)
        if fails:
            raise ZeroDivisionError
        backward = call(FORWARD_BACKWARD, {"batch": [seen.number]}, base=toy.base, adds_gradient=True)
        return (await toy.core.start(backward, place)).number

    first = call(OPTIM_STEP, {}, base=toy.base)
    return compose.compose(toy.core, Composed(first=first, then=then, operation="custom", keeps_a_place=True))


async def test_a_kept_place_holds_up_those_behind(server: ScriptedServer, toy: Toy) -> None:
    """What is submitted after the composed operation reaches the server after its last part."""
    future, behind = in_two_passes(toy), toy.sample_async("x")
    assert await behind == Numbered(3)
    assert await future == 2
    assert server.order() == ["optim_step", "forward_backward", "sample"]


async def test_a_kept_place_that_is_not_used_is_given_up(server: ScriptedServer, toy: Toy) -> None:
    """When the computation in between fails, the step behind it is not sent, and the run goes on."""
    future, step, behind = in_two_passes(toy, fails=True), toy.optim_step(), toy.forward_backward([1])
    with pytest.raises(ZeroDivisionError):
        await future
    with pytest.raises(errors.OperationFailedError, match="incomplete gradient"):
        await step
    assert await behind == Numbered(2)


async def test_closing_the_client_ends_the_composition(server: ScriptedServer, toy: Toy) -> None:
    """Whoever waits for a sampler learns that the client was closed."""
    future = toy.publish("a")
    waiting = asyncio.ensure_future(future.result_async())
    await asyncio.sleep(0.1)
    await toy.aclose()
    with pytest.raises(errors.ClientClosedError):
        await waiting


async def test_a_sampler_that_cannot_be_asked_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is restarting does not end the wait; its last words are told if time runs out."""
    monkeypatch.setattr(compose, "_PAUSES", (0.001, 0.001))
    answers: Iterator[int | Exception] = iter([errors.ServerUnreachableError("down"), 0, 3])

    async def serving(_: float) -> int:
        answer = next(answers, errors.ServerUnreachableError("still down"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    await wait_for_version(serving, 3, ceiling=30.0)
    with pytest.raises(errors.SamplerNotReadyError, match=r"seen was -1\); the last answer was: still down"):
        await wait_for_version(serving, 3, ceiling=0.05)

    async def old(_: float) -> int:
        return 2

    with pytest.raises(errors.SamplerNotReadyError, match=r"seen was 2\)$"):
        await wait_for_version(old, 3, ceiling=0.05)


@pytest.mark.parametrize(
    "final",
    [
        errors.ServerRestartedError("gone"),
        errors.AuthenticationError("no key"),
        errors.ResourceNotFoundError("no sampler", resource_type="sampler", resource_id="s"),
    ],
)
async def test_a_sampler_that_is_gone_for_good_ends_the_wait(final: errors.TGTinkerError) -> None:
    """What asking again cannot mend is told at once, and not after the ceiling."""

    async def serving(_: float) -> int:
        raise final

    with pytest.raises(type(final)):
        await asyncio.wait_for(wait_for_version(serving, 3), timeout=30.0)
