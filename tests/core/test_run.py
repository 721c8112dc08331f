"""Submits of one run: their order, what stops them, how they are cancelled and closed."""

from __future__ import annotations

import asyncio
import contextvars
import logging

import pytest
from fixtures import faults
from fixtures.client import FORWARD_BACKWARD, OPTIM_STEP, TG, Numbered, Toy, connect_here
from fixtures.server import ScriptedServer

from tg_tinker import errors
from tg_tinker.core.call import call
from tg_tinker.core.reply import Reply
from tg_tinker.core.run import RunCore


async def on_its_way(server: ScriptedServer) -> None:
    """Wait until the server has met the fault that the next ``forward_backward`` is to meet."""
    while server.faults["forward_backward"]:
        await asyncio.sleep(0.01)


async def test_program_order_is_server_order_also_under_retries(server: ScriptedServer, either: Toy) -> None:
    """A submit that has to be retried holds up those behind it."""
    server.faults["forward_backward"].extend([faults.reset(), faults.status(503), faults.late(0.05)])
    futures = [either.forward_backward([1]), either.optim_step(), either.forward_backward([2]), either.optim_step()]
    assert [repr(future) for future in futures[:2]] == [
        "<OperationFuture forward_backward #1 on run r-1: submitting>",
        "<OperationFuture optim_step #2 on run r-1: submitting>",
    ]
    assert [(await future).number for future in futures] == [1, 2, 3, 4]
    assert server.order() == ["forward_backward", "optim_step"] * 2


async def test_the_place_is_taken_at_the_call_not_at_the_await(server: ScriptedServer, toy: Toy) -> None:
    """Coroutines awaited in another order reach the server in the order in which they were made."""
    first, second = toy.forward_backward_async([1]), toy.optim_step_async()
    await second
    await first
    assert server.order() == ["forward_backward", "optim_step"]


async def test_validation_raises_at_the_call(server: ScriptedServer, toy: Toy) -> None:
    """Nothing is scheduled, no place is taken, and the field is named."""
    with pytest.raises(errors.InvalidRequestError) as caught:
        toy.forward_backward_async([])
    assert caught.value.field == "batch"
    await toy.optim_step()
    assert server.requests[0][1].endswith("optim_step")


async def test_a_refused_submit_releases_its_place(server: ScriptedServer, toy: Toy) -> None:
    """The server's refusal surfaces on await, and the run goes on."""
    server.faults["sample"].append(faults.status(422))
    refused, next_one = toy.sample_async("x"), toy.forward_backward([1])
    with pytest.raises(errors.InvalidRequestError) as caught:
        await refused
    assert caught.value.__notes__[0].startswith("sample #1 on run r-1, submitted at client.py:")
    assert await next_one == Numbered(1)


async def test_a_step_behind_a_refused_gradient_is_not_sent(server: ScriptedServer, toy: Toy) -> None:
    """A pipelined optim_step never applies a gradient that is missing a part."""
    server.faults["forward_backward"].append(faults.status(422))
    backward, step = toy.forward_backward([1]), toy.optim_step()
    with pytest.raises(errors.OperationFailedError, match="incomplete gradient"):
        await step
    with pytest.raises(errors.InvalidRequestError):
        await backward
    assert server.order() == []
    await toy.forward_backward([2])
    await toy.optim_step()
    assert server.order() == ["forward_backward", "optim_step"]


async def test_a_step_behind_a_withdrawn_gradient_is_not_sent(server: ScriptedServer, toy: Toy) -> None:
    """Cancelling a forward_backward that waits its turn stops the step behind it, by name, and not the one before."""
    gate = asyncio.Event()
    server.faults["forward_backward"].append(faults.until(gate))
    first, before, cancelled, behind = (
        toy.forward_backward([1]),
        toy.optim_step(),
        toy.forward_backward([2]),
        toy.optim_step(),
    )
    assert await cancelled.cancel_async()
    gate.set()
    await first
    await before
    with pytest.raises(errors.OperationFailedError, match="forward_backward #3 before it failed or was cancelled"):
        await behind
    await toy.forward_backward([3])
    await toy.optim_step()
    assert server.order() == ["forward_backward", "optim_step"] * 2


async def test_sequence_numbers_follow_the_order(server: ScriptedServer, toy: Toy) -> None:
    """Where the wire wants numbers, they are those of the places."""
    for _ in range(3):
        await toy.core.start(call(FORWARD_BACKWARD, {"batch": [1]}, base=TG, sequenced=True))
    assert [operation.body["seq_id"] for operation in server.accepted("forward_backward")] == [1, 2, 3]


async def test_a_queued_submit_is_withdrawn_without_a_request(server: ScriptedServer, toy: Toy) -> None:
    """Cancelling what has not been sent sends nothing, and is true."""
    gate = asyncio.Event()
    server.faults["forward_backward"].append(faults.until(gate))
    first, second, third = toy.forward_backward([1]), toy.optim_step(), toy.forward_backward([2])
    assert await second.cancel_async()
    assert second.status == "cancelled"
    assert await second.cancel_async(), "asked again, the answer is the same"
    gate.set()
    with pytest.raises(errors.FutureCancelledError):
        await second
    await first
    await third
    assert server.order() == ["forward_backward", "forward_backward"]


async def test_cancel_tells_the_truth(server: ScriptedServer, either: Toy) -> None:
    """The server says yes for what is queued, no for what is done."""
    server.held.add("forward_backward")
    queued = await either.forward_backward_async([1])
    done = await either.optim_step_async()
    assert await queued.cancel_async()
    assert not await done.cancel_async()
    with pytest.raises(errors.FutureCancelledError) as caught:
        await queued
    assert caught.value.future_id == "fut-1"
    assert queued.status == "cancelled"
    assert await done == Numbered(2)
    assert not await done.cancel_async(), "settled by now"


async def test_cancel_during_the_submit_waits_for_the_answer(server: ScriptedServer, toy: Toy) -> None:
    """A submit on its way is cancelled once it has a ticket; one that is refused is not."""
    server.held.add("forward_backward")
    for answers, cancelled in ((faults.until, True), (lambda event: faults.after(event, faults.status(422)), False)):
        gate = asyncio.Event()
        server.faults["forward_backward"].append(answers(gate))
        future = toy.forward_backward([1])
        await on_its_way(server)
        cancelling = asyncio.create_task(future.cancel_async())
        await asyncio.sleep(0.02)
        assert not cancelling.done()
        gate.set()
        assert await cancelling is cancelled
        assert future.is_failed()


async def test_a_cancelled_operation_found_by_a_poll_is_cancelled(server: ScriptedServer, either: Toy) -> None:
    """Somebody else's cancellation shows as such."""
    server.held.add("forward_backward")
    future = await either.forward_backward_async([1])
    await either.core.cancel("fut-1")
    with pytest.raises(errors.FutureCancelledError):
        await future
    assert future.status == "cancelled"


async def test_cancelling_a_submit_in_flight_leaves_no_hole(
    server: ScriptedServer, toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    """The POST goes on without its caller, the next one is not held up, and close names the orphan."""
    gate = asyncio.Event()
    server.faults["forward_backward"].append(faults.until(gate))
    submitting = asyncio.ensure_future(toy.forward_backward_async([1]))
    await on_its_way(server)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    gate.set()
    await toy.optim_step()
    assert server.order() == ["forward_backward", "optim_step"]
    with caplog.at_level(logging.WARNING, "tg_tinker.core"):
        await toy.aclose()
    assert "<OperationFuture forward_backward fut-1: pending> was accepted by the server though" in caplog.text


async def test_an_orphan_that_was_looked_after_is_not_reported(
    server: ScriptedServer, toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    """The client remembers it, so it can be waited for after all."""
    gate = asyncio.Event()
    server.faults["forward_backward"].append(faults.until(gate))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(toy.forward_backward_async([1]), 0.02)
    gate.set()
    (orphan,) = toy.core.orphans
    assert await orphan == Numbered(1)
    await toy.aclose()
    assert caplog.text == ""


async def test_wait_for_leaves_the_operation_alive(server: ScriptedServer, either: Toy) -> None:
    """A timeout around an await ends the wait for one, and for nobody else."""
    server.held.add("forward_backward")
    future = await either.forward_backward_async([1])
    other = asyncio.ensure_future(future.result_async())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(future, 0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await future
    assert not other.done()
    server.release("forward_backward")
    assert await other == Numbered(1)
    assert await future == Numbered(1)


async def test_direct_calls_are_accepted_then_retrieved(server: ScriptedServer, toy: Toy) -> None:
    """With the extension a sample takes its place, is accepted at once, and lets training go on."""
    server.held.add("sample")
    sampling = asyncio.ensure_future(toy.sample_async("x"))
    await toy.forward_backward([1])
    assert server.order() == ["sample", "forward_backward"]
    server.release("sample")
    assert await sampling == Numbered(1)


async def test_direct_calls_work_without_the_extension(server: ScriptedServer, toy: Toy) -> None:
    """A server that answers 200 with the result is understood."""
    server.offers_async = False
    assert await toy.sample_async("x") == Numbered(1)
    assert server.polls() == []


async def test_abandoning_a_direct_call_asks_the_server_to_cancel(server: ScriptedServer, toy: Toy) -> None:
    """Nobody holds a handle, so a cancelled caller takes the work back."""
    server.held.add("sample")
    sampling = asyncio.ensure_future(toy.sample_async("x"))
    while not server.polls():
        await asyncio.sleep(0.01)
    sampling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampling
    assert server.operations["fut-1"].status == "cancelled"


async def test_abandoning_a_direct_call_in_line_withdraws_it(server: ScriptedServer, toy: Toy) -> None:
    """What was not sent is never sent."""
    gate = asyncio.Event()
    server.faults["forward_backward"].append(faults.until(gate))
    first = toy.forward_backward([1])
    sampling = asyncio.ensure_future(toy.sample_async("x"))
    await asyncio.sleep(0.01)
    sampling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampling
    gate.set()
    await first
    await toy.optim_step()
    assert server.order() == ["forward_backward", "optim_step"]


async def test_bookkeeping_runs_before_anybody_sees_the_result(toy: Toy) -> None:
    """When ``optim_step`` is done, the client's step says so."""
    future = toy.optim_step()
    await future
    assert toy.steps == 1
    await future
    assert toy.steps == 1


async def test_an_eager_operation_is_fetched_though_nobody_waits(toy: Toy) -> None:
    """A tracked operation updates the client by itself."""
    toy.optim_step(eager=True)
    while toy.steps < 1:
        await asyncio.sleep(0.01)


async def test_bookkeeping_that_fails_settles_the_future(toy: Toy) -> None:
    """An error of the client's own hook is an outcome, not a hang."""

    def broken(_: Numbered) -> None:
        raise ZeroDivisionError("hook")

    future = toy.core.start(call(OPTIM_STEP, {}, base=TG, on_result=broken))
    with pytest.raises(ZeroDivisionError, match="hook"):
        await future


async def test_an_operation_can_be_found_again(server: ScriptedServer, either: Toy) -> None:
    """A future made from an id waits and cancels like the first one."""
    await either.forward_backward_async([1])
    found = either.core.attach("fut-1", call(FORWARD_BACKWARD, {}, base=either.base))
    assert await found == Numbered(1)
    assert await found.accepted() is found
    assert found.label.startswith("forward_backward fut-1 on run r-1, looked up at test_run.py:")


async def test_use_after_close(server: ScriptedServer, toy: Toy) -> None:
    """Every face of a closed client raises ClientClosedError at the call; open futures end with it."""
    server.held.add("forward_backward")
    waited = await toy.forward_backward_async([1])
    held = await toy.forward_backward_async([1])
    waiting = asyncio.ensure_future(waited.result_async())
    while not server.polls():
        await asyncio.sleep(0.01)
    await toy.aclose()
    await toy.aclose()
    for use in (
        lambda: toy.forward_backward([1]),
        lambda: toy.forward_backward_async([1]),
        lambda: toy.sample_async("x"),
        toy.health_async,
        lambda: toy.sample_stream("x"),
        lambda: toy.publish("x"),
    ):
        with pytest.raises(errors.ClientClosedError):
            use()
    with pytest.raises(errors.ClientClosedError):
        await waiting
    with pytest.raises(errors.ClientClosedError):
        await held


async def test_closing_one_run_leaves_the_others_open(server: ScriptedServer, toy: Toy) -> None:
    """Runs share the connection, not their fate."""
    other = Toy(RunCore(toy.core.service, toy.core.retrieval, name="run r-2"))
    await other.core.aclose()
    with pytest.raises(errors.ClientClosedError, match="of run r-2 is closed"):
        other.forward_backward([1])
    assert repr(other.core) == "<RunCore run r-2 closed>"
    assert await toy.forward_backward([1]) == Numbered(1)


async def test_a_hook_that_fails_at_close_keeps_nothing_from_closing(
    toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    """The other hooks run, the tasks end, and the log has the error."""
    ran: list[str] = []

    def failing() -> None:
        raise OSError(28, "no space left", "log.txt")

    toy.core.at_close += [failing, lambda: ran.append("second")]
    await toy.core.aclose()
    assert ran == ["second"]
    assert "failing" in caplog.text
    assert "no space left" in caplog.text
    with pytest.raises(errors.ClientClosedError):
        toy.forward_backward([1])


async def test_a_submit_in_flight_at_close_is_told(server: ScriptedServer, toy: Toy) -> None:
    """Nobody is left waiting for an acceptance that will not come."""
    server.faults["forward_backward"].append(faults.until(asyncio.Event()))
    first, second = toy.forward_backward([1]), toy.optim_step()
    await on_its_way(server)
    await toy.aclose()
    for future in (first, second):
        with pytest.raises(errors.ClientClosedError):
            await future


async def test_direct_errors_say_which_call(server: ScriptedServer, toy: Toy) -> None:
    """Also a call without a future carries a note with the user's line."""
    server.faults["healthz"].append(faults.status(403))
    with pytest.raises(errors.AuthorizationError) as caught:
        await toy.health_async()
    assert caught.value.__notes__[0].startswith("health on run r-1, called at client.py:")


async def test_a_call_may_read_the_whole_reply(toy: Toy) -> None:
    """Bytes and headers are there for those who ask."""
    from fixtures.client import HEALTH

    def read(reply: Reply) -> tuple[int, bytes]:
        return reply.status, reply.body

    assert await toy.core.perform(call(HEALTH, decode=read, whole_reply=True)) == (200, b'{"status": "ok"}')


async def test_polls_run_in_the_context_of_the_submit(server: ScriptedServer, toy: Toy) -> None:
    """Tracing sees the submitter, whoever waits first."""
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen: list[str] = []
    who.set("submitter")
    future = toy.core.start(call(OPTIM_STEP, {}, base=TG, on_result=lambda _: seen.append(who.get())))
    await future.accepted()
    who.set("waiter")
    await future
    assert seen == ["submitter"]


async def test_a_home_made_on_this_loop_starts_no_thread(server: ScriptedServer) -> None:
    """A client on the caller's loop needs no bridge."""
    import threading

    before = {thread.name for thread in threading.enumerate()}
    toy = connect_here(server.url)
    await toy.forward_backward([1])
    await toy.aclose()
    names = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in names if name.startswith("tg-tinker")}
