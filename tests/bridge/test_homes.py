"""Homes by themselves: jobs, hops, and what happens where a loop is missing, foreign or gone."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import threading
import warnings

import pytest
from fixtures.client import Toy, connect

from tg_tinker import bridge, errors
from tg_tinker.bridge import LoopHome, ThreadHome
from tg_tinker.futures import OperationFuture
from tg_tinker.threads import loop_thread
from tg_tinker.threads.loop_thread import LoopThread


class Guest:
    """Something open."""

    def __init__(self) -> None:
        self.closed = False

    async def disconnect(self) -> None:
        """Note it."""
        self.closed = True

    def abandon(self) -> None:
        """Do nothing."""


async def give(value: int) -> int:
    """Take a turn of the loop and give a value."""
    await asyncio.sleep(0)
    return value


def test_work_runs_on_the_named_thread() -> None:
    """The thread and its tasks have names that read well in a profiler."""

    async def names() -> tuple[str, str]:
        task = asyncio.current_task()
        assert task is not None
        return threading.current_thread().name, task.get_name()

    job = ThreadHome().spawn(names(), name="forward_backward#12")
    assert job.ended.wait(30)
    assert job.outcome() == ("tg-tinker-loop", "forward_backward#12")


def test_context_travels_with_the_work() -> None:
    """Tracing variables of the caller are seen at home; the thread itself starts with an empty context."""
    trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")

    async def look() -> str:
        return trace.get()

    bridge.shutdown()
    trace.set("mine")
    home = ThreadHome()
    assert home.run(look()) == "mine"
    seen: list[str] = []
    done = threading.Event()
    contextvars.Context().run(home.call_soon, lambda: seen.append(trace.get()))
    home.call_soon(done.set)
    assert done.wait(30)
    assert seen == ["none"]


def test_an_error_that_is_not_ours_keeps_its_traceback() -> None:
    """A bug at home shows where it is."""

    async def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        ThreadHome().run(broken())
    assert caught.traceback[-1].name == "broken"


def test_a_job_stopped_before_it_began_ends() -> None:
    """Stopping right after starting leaves nothing waiting."""

    async def main() -> None:
        home = LoopHome()
        job = home.spawn(give(1))
        job.stop()
        await job.ended.wait_async()
        with pytest.raises(asyncio.CancelledError):
            job.outcome()
        job = home.spawn(give(1))
        home.call_soon(job.stop)
        await job.ended.wait_async()
        assert isinstance(job.error(), asyncio.CancelledError)

    asyncio.run(main())


def test_a_hop_that_is_dropped_stops_its_work(toy: Toy) -> None:
    """A coroutine that is closed while it waits takes its work along."""
    begun, ended = threading.Event(), threading.Event()

    async def forever() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def main() -> None:
        hop = toy.core.home.hop(forever)
        task = asyncio.current_task()
        assert task is not None
        hop.send(None)
        await asyncio.to_thread(begun.wait, 30)
        hop.close()

    asyncio.run(main())
    assert ended.wait(30)


@pytest.mark.parametrize("name", ["sample_async", "health_async"])
def test_a_call_that_is_cancelled_before_its_first_step_leaves_no_coroutine(toy: Toy, name: str) -> None:
    """A task group that fails at once cancels tasks that never ran: no coroutine of ours is left to be awaited."""
    arguments = ("a prompt",) if name == "sample_async" else ()

    async def main() -> None:
        task = asyncio.create_task(getattr(toy, name)(*arguments))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    assert [str(warning.message) for warning in seen] == []


def test_ctrl_c_inside_work_ends_the_users_own_loop() -> None:
    """On the caller's loop KeyboardInterrupt goes where it would have gone without us."""

    async def interrupted() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        job = LoopHome().spawn(interrupted())
        await job.ended.wait_async()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop thread has as long for its end as a busy machine may need."""
    for budget in ("STOP_BUDGET", "_CLOSE_BUDGET"):
        monkeypatch.setattr(loop_thread, budget, 30.0)


@pytest.mark.usefixtures("patient")
def test_guests_are_closed_with_the_thread() -> None:
    """What is still open when the loop ends is closed there."""
    home, guest, gone = ThreadHome(), Guest(), Guest()
    home.run(give(1))
    home.host(guest)
    home.host(gone)
    home.unhost(gone)
    bridge.shutdown()
    assert guest.closed
    assert not gone.closed


def test_shutting_down_twice_or_before_the_start_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no thread to end, or to leave."""
    monkeypatch.setattr(bridge, "_shared", bridge._Shared())
    bridge.shutdown()
    ThreadHome().unhost(Guest())
    bridge._after_fork()
    assert ThreadHome().loop() is None


def test_a_call_that_meets_an_ending_thread_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the call the thread may end; the call is not lost."""
    ending = LoopThread()
    monkeypatch.setattr(LoopThread, "call_soon", _once_refused(LoopThread.call_soon))
    assert ThreadHome().run(give(3)) == 3
    ending.loop.close()


def _once_refused(call_soon: object) -> object:
    refused: list[bool] = []

    def call(self: LoopThread, function: object, /, *args: object) -> bool:
        if not refused:
            refused.append(True)
            return False
        return bool(call_soon(self, function, *args))  # type: ignore[operator]

    return call


@pytest.mark.usefixtures("patient")
def test_the_next_thread_begins_when_the_last_has_ended() -> None:
    """What was open on the one is closed there before anything happens on the other, where it may be opened again."""
    home, log = ThreadHome(), list[str]()

    class Slow(Guest):
        async def disconnect(self) -> None:
            await asyncio.sleep(0.1)
            log.append("closed")

    def leave() -> None:
        raise SystemExit(4)

    async def use() -> None:
        log.append("used")

    home.run(give(1))
    home.host(Slow())
    home.call_soon(leave)
    while not bridge._shared.thread.ended:  # type: ignore[union-attr]
        threading.Event().wait(0.001)
    home.run(use())
    assert log == ["closed", "used"]


def test_a_finished_thread_takes_no_calls() -> None:
    """Calling and stopping after the end are harmless."""
    thread = LoopThread()
    thread.start()
    thread.stop()
    assert not thread.call_soon(print)
    thread.stop()
    ThreadHome().run(give(1))
    assert bridge._shared._start() is bridge._shared.thread, "one that runs is not replaced"


def test_stopping_from_the_loop_itself_does_not_wait_for_itself() -> None:
    """A callback may end the thread it runs on."""
    thread = LoopThread()
    thread.start()
    thread.call_soon(thread.stop)
    thread._thread.join(30)
    assert thread.ended


def test_work_that_refuses_to_end_does_not_hold_up_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that swallows its cancellation costs a second, not for ever."""
    monkeypatch.setattr(loop_thread, "_CANCEL_BUDGET", 0.06)
    thread = LoopThread()
    thread.start()
    begun = threading.Event()

    async def stubborn() -> None:
        begun.set()
        for _ in range(6):
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue

    async def start() -> None:
        task = asyncio.create_task(stubborn())
        task._log_destroy_pending = False  # type: ignore[attr-defined]

    asyncio.run_coroutine_threadsafe(start(), thread.loop).result(30)
    assert begun.wait(30)
    thread.stop()
    assert thread.ended


def test_a_closed_loop_refuses_before_anything_is_queued() -> None:
    """A client whose loop is gone raises at the call and leaves its lane free."""

    async def make() -> LoopHome:
        return LoopHome()

    home = asyncio.run(make())
    toy = connect("http://127.0.0.1:9", home)

    async def main() -> None:
        for use in (
            lambda: toy.forward_backward([1]),
            lambda: toy.forward_backward_async([1]),
            lambda: toy.sample_stream("x"),
        ):
            with pytest.raises(errors.ClientClosedError, match="is closed"):
                use()

    asyncio.run(main())
    assert repr(toy.core.lane) == "<Lane 3 taken>"


def test_a_loop_of_another_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forked child the parent's loop is nobody's home."""

    async def main() -> None:
        home = LoopHome()
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(errors.ClientClosedError, match="make a new one in this child"):
            home.call_soon(print)
        monkeypatch.undo()

    asyncio.run(main())


class Nobody:
    """A backer that never delivers."""

    def wake(self, _: object) -> None:
        """Do nothing."""

    async def cancel(self, _: object) -> bool:
        """Refuse."""
        return False


def test_a_future_whose_loop_is_gone_can_still_be_looked_at() -> None:
    """``done()`` never raises; what was settled stays; callbacks are called where they can be."""

    async def make() -> LoopHome:
        return LoopHome()

    home = asyncio.run(make())
    future: OperationFuture[int] = OperationFuture(home, Nobody(), operation="step", label="step #1, submitted at x")
    assert not future.done()
    assert future.status == "pending"
    with pytest.raises(errors.ClientClosedError):
        asyncio.run(future.result_async())
    future.settle(3)
    future.settle(4)
    future.outcome.progress("running")
    assert future.outcome.wanted_until() < 0
    seen: list[int] = []
    future.add_done_callback(lambda done: seen.append(done.result()))
    assert seen == [3]
    future._wake_backer()


def test_an_inherited_future_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process an open future says where it belongs, a settled one gives its result."""
    future: OperationFuture[int] = OperationFuture(ThreadHome(), Nobody(), operation="step", label="step #1")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert not future.done()
    with pytest.raises(errors.ClientClosedError, match=r"was submitted by process \d+; this forked child"):
        future.result()
    future.settle(1)
    assert future.result() == 1


def test_an_open_future_stays_open_when_it_cannot_be_cancelled() -> None:
    """A backer that says no has the last word."""
    future: OperationFuture[int] = OperationFuture(ThreadHome(), Nobody(), operation="step", label="step #1")
    assert not future.cancel()
    assert future.status == "pending"
