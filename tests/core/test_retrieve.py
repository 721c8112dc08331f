"""How outcomes are fetched: one poller, exact deadlines, and only final answers kept."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from fixtures import faults
from fixtures.client import Numbered, Toy, connect_here
from fixtures.server import ScriptedServer

from tg_tinker import errors
from tg_tinker.core import retrieve
from tg_tinker.core.call import call
from tg_tinker.core.endpoint import FixedEndpoint
from tg_tinker.core.transport import RetryPolicy
from tg_tinker.wire.route import Route


async def test_both_wires_give_the_result(either: Toy) -> None:
    """Submit and retrieve work alike on both wires."""
    future = await either.forward_backward_async([1])
    assert future.id == future.operation_id == future.future_id == "fut-1"
    assert await future == Numbered(1)
    assert await future == Numbered(1), "a settled future gives its result again"
    assert repr(future) == "<OperationFuture forward_backward fut-1: completed>"


async def test_nobody_polls_while_nobody_waits(server: ScriptedServer, toy: Toy) -> None:
    """A future that is only held costs no request."""
    future = await toy.forward_backward_async([1])
    await asyncio.sleep(0.05)
    assert server.polls() == []
    assert future.label.startswith("forward_backward #1 on run r-1, submitted at client.py:")


async def test_many_waiters_share_one_poller(server: ScriptedServer, either: Toy) -> None:
    """However many wait, one request is held."""
    server.held.add("forward_backward")
    future = await either.forward_backward_async([1])
    waiters = [asyncio.ensure_future(future.result_async()) for _ in range(20)]
    await asyncio.sleep(0.05)
    server.release("forward_backward")
    assert await asyncio.gather(*waiters) == [Numbered(1)] * 20
    assert len(server.polls()) == 1


async def test_a_poll_is_told_how_long_to_hold(server: ScriptedServer, either: Toy) -> None:
    """The hold is what remains of the longest wait, and thirty seconds at most."""
    server.held.add("forward_backward")
    waiting = {
        timeout: asyncio.ensure_future((await either.forward_backward_async([1])).result_async(timeout))
        for timeout in (20.0, None)
    }
    while len(server.polls()) < 2:
        await asyncio.sleep(0.01)
    server.release("forward_backward")
    assert [await one for one in waiting.values()] == [Numbered(1), Numbered(2)]
    bounded, unbounded = [float(parse_qs(urlsplit(path).query)["wait"][0]) for path in sorted(server.polls())]
    assert 0.0 < bounded <= 20.0
    assert unbounded == 30.0


async def test_a_wait_that_is_over_says_so(server: ScriptedServer, either: Toy) -> None:
    """The error has the timeout and the future's id, and says that the operation goes on."""
    server.held.add("forward_backward")
    future = await either.forward_backward_async([1])
    with pytest.raises(errors.FutureTimeoutError) as caught:
        await future.result_async(timeout=0.2)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.timeout == 0.2
    assert caught.value.future_id == "fut-1"
    assert "is not done after 0.2 s; it goes on" in str(caught.value)
    server.release("forward_backward")
    assert await future == Numbered(1)


async def test_deadlines_are_exact_whatever_the_server_does(server: ScriptedServer, toy: Toy) -> None:
    """A server that holds longer than asked does not hold the caller."""
    server.held.add("forward_backward")
    server.faults["poll"].append(faults.until(asyncio.Event()))
    future = await toy.forward_backward_async([1])
    with pytest.raises(errors.FutureTimeoutError):
        await future.result_async(timeout=0.2)


async def test_polling_stops_when_the_waiters_are_gone(server: ScriptedServer, toy: Toy) -> None:
    """After a timeout the poll under way ends, and no other follows."""
    server.held.add("forward_backward")
    future = await toy.forward_backward_async([1])
    with pytest.raises(errors.FutureTimeoutError):
        await future.result_async(timeout=0.05)
    await asyncio.gather(*toy.core.tasks)
    polls = len(server.polls())
    await asyncio.sleep(0.3)
    assert len(server.polls()) == polls
    server.release("forward_backward")
    assert await future == Numbered(1)


async def test_a_server_that_does_not_hold_is_not_hammered(server: ScriptedServer, either: Toy) -> None:
    """Instant answers of "pending" are met with growing pauses."""
    server.holds = False
    server.held.add("forward_backward")
    future = await either.forward_backward_async([1])
    with pytest.raises(errors.FutureTimeoutError):
        await future.result_async(timeout=1.0)
    assert len(server.polls()) <= 6
    server.release("forward_backward")
    assert await future == Numbered(1)


@pytest.mark.parametrize("fault", [faults.reset(), *(faults.status(code) for code in (429, 502, 503, 504))])
async def test_transient_faults_of_a_poll_are_tried_again(
    server: ScriptedServer, either: Toy, fault: faults.Fault
) -> None:
    """A poll that fails for a moment is not the operation's failure."""
    server.faults["poll"].extend([fault, fault])
    assert await either.forward_backward([1]) == Numbered(1)


async def test_lasting_trouble_ends_the_wait_and_not_the_future(server: ScriptedServer, toy: Toy) -> None:
    """When polls keep failing the waiters get the error; the same future can be awaited again."""
    server.faults["poll"].extend([faults.status(500)])
    future = await toy.forward_backward_async([1])
    with pytest.raises(errors.ServerError, match="scripted 500") as caught:
        await future
    assert caught.value.__notes__ == [future.label]
    assert not future.outcome.settled
    assert await future == Numbered(1)


async def test_a_callback_outlives_trouble(server: ScriptedServer, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever attached a callback is told in the end, however long the server was away."""
    monkeypatch.setattr(retrieve, "_TROUBLE_PAUSE", 0.01)
    server.faults["poll"].extend([faults.status(500), faults.status(401), faults.status(500)])
    future = await toy.forward_backward_async([1])
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: told.set_result(done.result().number))
    assert await told == 1


@pytest.mark.parametrize("status", [404, 409, 410])
async def test_a_future_that_is_gone_is_a_typed_error(server: ScriptedServer, toy: Toy, status: int) -> None:
    """The server's last word settles the future."""
    future = await toy.forward_backward_async([1])
    server.faults["poll"].append(faults.status(status))
    with pytest.raises(errors.TGTinkerError, match=f"scripted {status}"):
        await future
    assert future.status in {"failed", "cancelled"}


async def test_an_unknown_future_is_not_found(server: ScriptedServer, toy: Toy) -> None:
    """An evicted or mistyped id says so."""
    future = await toy.forward_backward_async([1])
    server.operations.clear()
    with pytest.raises(errors.ResourceNotFoundError):
        await future


async def test_a_failure_keeps_its_class_and_fields(server: ScriptedServer, either: Toy) -> None:
    """What failed while it executed comes out of the future as itself, with notes on what it was."""
    details = {"current_epsilon": 7.9, "max_epsilon": 8.0, "projected_epsilon": 8.3, "delta": 1e-5}
    server.failing["optim_step"] = {
        "code": "DP_BUDGET_EXCEEDED", "message": "too much", "details": details, "request_id": "req-4"
    }  # fmt: skip
    future = await either.optim_step_async()
    with pytest.raises(errors.DPBudgetExceededError) as caught:
        await future
    assert caught.value.max_epsilon == 8.0
    assert caught.value.request_id == "req-4"
    assert caught.value.__notes__ == [future.label]
    assert future.is_failed()
    assert not future.is_success()
    assert isinstance(future.get_error(), errors.DPBudgetExceededError)
    assert either.steps == 0


@pytest.mark.parametrize("error", [{"message": "CUDA out of memory"}, {"code": "ODD", "message": "CUDA out of memory"}])
async def test_a_failure_without_a_known_code_is_an_operation_failure(
    server: ScriptedServer, either: Toy, error: dict[str, str]
) -> None:
    """A foreign server's words are kept."""
    server.failing["optim_step"] = error
    with pytest.raises(errors.OperationFailedError, match="CUDA out of memory"):
        await either.optim_step()


async def test_a_result_that_does_not_fit_is_a_typed_error(server: ScriptedServer, toy: Toy) -> None:
    """A server that sends another shape is named as the culprit, once and for all."""
    server.failing.clear()
    future = await toy.forward_backward_async([1])
    server.operations["fut-1"].result = {"number": "one"}
    with pytest.raises(errors.ServerError, match="the server's answer does not fit"):
        await future
    assert future.outcome.settled


async def test_a_result_of_none_is_kept(server: ScriptedServer, toy: Toy) -> None:
    """None is a value like any other: it is fetched once."""
    nothing: Route[None] = Route("nothing", "POST", "/nothing", type(None), "submit")
    future = toy.core.start(call(nothing, base=toy.base, decode=lambda _: None))
    assert await future is None  # type: ignore[func-returns-value]
    assert await future is None  # type: ignore[func-returns-value]
    assert len(server.polls()) == 1


async def test_asking_without_waiting_gets_the_outcome_fetched(server: ScriptedServer, toy: Toy) -> None:
    """``while not future.done()`` ends."""
    future = await toy.forward_backward_async([1])
    assert future.status == "pending"
    for _ in range(500):
        if future.done():
            break
        await asyncio.sleep(0.01)
    assert future.is_success()
    assert future.get_error() is None
    assert len(server.polls()) == 1


async def test_progress_is_seen(server: ScriptedServer, toy: Toy) -> None:
    """A poll that says "running" shows in the status."""
    server.held.add("forward_backward")
    future = await toy.forward_backward_async([1])
    server.operations["fut-1"].status, server.holds = "running", False
    while future.status != "running":
        await asyncio.sleep(0.01)
    server.operations["fut-1"].status = "pending"
    server.release("forward_backward")
    await future


@pytest.mark.parametrize(("padding", "here"), [(300, True), (300_000, False)])
async def test_large_results_are_decoded_off_the_loop(
    server: ScriptedServer, toy: Toy, monkeypatch: pytest.MonkeyPatch, padding: int, *, here: bool
) -> None:
    """A big answer is decoded in another thread, where it stalls nobody; a small one is not worth the way there."""
    threads, decoded = list[threading.Thread](), retrieve.decoded

    def watched(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return decoded(*arguments)

    monkeypatch.setattr(retrieve, "decoded", watched)
    future = await toy.forward_backward_async([1])
    server.operations["fut-1"].result = {"number": 1, "padding": "x" * padding}
    assert await future == Numbered(1)
    (thread,) = threads
    assert (thread is threading.current_thread()) == here


async def test_crowded_polls_are_held_shortly(server: ScriptedServer, toy: Toy) -> None:
    """When more wait than there are connections, nobody occupies one for half a minute."""
    await toy.health_async()
    toy.core.service.connection.polls = asyncio.Semaphore(1)
    server.held.add("forward_backward")
    futures = [await toy.forward_backward_async([1]) for _ in range(3)]
    waiting = [asyncio.ensure_future(future.result_async()) for future in futures]
    await asyncio.sleep(0.1)
    server.release("forward_backward")
    assert [result.number for result in await asyncio.gather(*waiting)] == [1, 2, 3]
    holds = [float(parse_qs(urlsplit(path).query)["wait"][0]) for path in server.polls()]
    assert sorted(holds) == [1.0, 1.0, 30.0]


async def test_a_dead_server_fails_the_future_with_its_explanation(server: ScriptedServer) -> None:
    """When the endpoint knows why, that is the outcome."""

    class Dying(FixedEndpoint):
        async def explain(self, error: BaseException) -> errors.TGTinkerError | None:
            return errors.ServerRestartedError("the server ended", exit_code=1, log_tail="out of memory")

    toy = connect_here(server.url, endpoint=Dying(server.url), policy=RetryPolicy())
    server.held.add("forward_backward")
    future = await toy.forward_backward_async([1])
    server.faults["poll"].extend([faults.reset()] * 2)  # aiohttp tries the first one again by itself
    with pytest.raises(errors.ServerRestartedError) as caught:
        await future
    assert caught.value.log_tail == "out of memory"
    assert future.status == "failed"
    await toy.aclose()


async def test_a_dropped_future_is_collected(server: ScriptedServer, toy: Toy) -> None:
    """Fire and forget leaves nothing behind but a line at close."""
    import weakref

    gone = weakref.ref(await toy.forward_backward_async([1]))
    assert gone() is None, "no reference cycle keeps it"
    polled = await toy.forward_backward_async([1])
    await polled
    gone = weakref.ref(polled)
    del polled
    await asyncio.gather(*toy.core.tasks)
    await asyncio.sleep(0)
    gc.collect()
    assert gone() is None


async def test_close_reports_what_was_never_waited_for(
    server: ScriptedServer, toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    """Operations that nobody asked after are named in the log, those that were are not."""
    await toy.forward_backward_async([1])
    await (await toy.optim_step_async())
    with caplog.at_level(logging.INFO, "tg_tinker.core"):
        await toy.aclose()
    assert caplog.messages[0].startswith("1 operations on run r-1 were never waited for: forward_backward #1 on")


async def test_what_is_remembered_until_close_is_bounded(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that never waits for its gradients does not grow."""
    from tg_tinker.core import run

    monkeypatch.setattr(run, "_REMEMBERED", 2)
    for _ in range(4):
        await toy.forward_backward_async([1])
    assert list(toy.core.unwatched) == ["fut-3", "fut-4"]
