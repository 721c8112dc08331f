"""Futures in a plain program: waiting, looking, callbacks, errors, garbage."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import math
import pickle
import threading
import time
import traceback
import warnings

import pytest
from fixtures.client import Numbered, Toy, idle
from fixtures.server import ThreadedServer

from tg_tinker import errors
from tg_tinker.futures import APIFuture, FutureHandle, OperationFuture
from tg_tinker.threads import latch as latch_module
from tg_tinker.threads.latch import Latch

FAILURE = {"code": "OPERATION_FAILED", "message": "out of memory", "details": {"operation": "forward_backward"}}


def test_one_class_three_names() -> None:
    """The names of both surfaces are one class."""
    assert FutureHandle is OperationFuture
    assert APIFuture is OperationFuture


def test_a_timeout_ends_only_the_wait(threaded: ThreadedServer, toy: Toy) -> None:
    """After a timeout the same future still gives the result."""
    threaded.script.held.add("forward_backward")
    future = toy.forward_backward([1])
    with pytest.raises(errors.FutureTimeoutError) as caught:
        future.result(timeout=0.2)
    assert caught.value.future_id == "fut-1"
    with pytest.raises(TimeoutError):
        future.exception(timeout=0.01)
    with pytest.raises(TimeoutError):
        future.result(timeout=0)
    assert not future.wait(0.01)
    assert not future.done()
    assert future.status == "pending"
    threaded.release("forward_backward")
    assert future.wait(30)
    assert future.result(timeout=0) == Numbered(1)
    assert future.is_done()
    assert future.is_success()


@pytest.mark.parametrize("timeout", ["5", math.nan, True, [1]])
def test_a_timeout_that_is_no_time_is_refused(threaded: ThreadedServer, toy: Toy, timeout: object) -> None:
    """The field is named, also where the outcome is known and nobody would have to wait."""
    threaded.script.held.add("forward_backward")
    future, done = toy.forward_backward([1]), toy.optim_step()
    done.result()
    for wait in (future.result, done.result, done.wait, done.exception):
        with pytest.raises(errors.InvalidRequestError) as caught:
            wait(timeout=timeout)  # type: ignore[arg-type]
        assert caught.value.field == "timeout"
    with pytest.raises(errors.InvalidRequestError):
        asyncio.run(done.result_async(timeout=timeout))  # type: ignore[arg-type]


def test_a_callback_that_cannot_be_called_is_refused(toy: Toy) -> None:
    """At the call, by name, not in a log when the outcome is known."""
    with pytest.raises(errors.InvalidRequestError) as caught:
        toy.optim_step().add_done_callback(None)  # type: ignore[arg-type]
    assert caught.value.field == "callback"


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 10**12])
def test_very_long_waits_are_waits(threaded: ThreadedServer, toy: Toy, timeout: float) -> None:
    """Times beyond what the platform counts do not overflow."""
    threaded.script.held.add("forward_backward")
    future = toy.forward_backward([1])
    later = threading.Timer(0.1, lambda: threaded.release("forward_backward"))
    later.start()
    assert future.result(timeout=timeout) == Numbered(1)
    later.join()


def test_looking_does_not_block_and_comes_to_an_end(threaded: ThreadedServer, toy: Toy) -> None:
    """``while not future.done(): ...`` is a loop that ends."""
    future = toy.forward_backward([1])
    while not future.is_done():
        time.sleep(0.01)
    assert future.status == "completed"


def test_tracebacks_do_not_grow(threaded: ThreadedServer, toy: Toy) -> None:
    """Raising the same failure again and again, also in two threads, gives equal tracebacks of few frames."""
    threaded.script.failing["forward_backward"] = FAILURE
    future = toy.forward_backward([1])
    depths: list[int] = []

    def look() -> None:
        for _ in range(5):
            try:
                future.result()
            except errors.OperationFailedError as error:
                depths.append(len(traceback.extract_tb(error.__traceback__)))
                notes = error.__notes__
                assert notes == [future.label]

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(depths) == 10
    first, *rest = sorted(depths)
    assert first == 2, "the user's frame and one of ours"
    assert max(rest) <= 4


def test_each_raise_is_a_fresh_exception(threaded: ThreadedServer, toy: Toy) -> None:
    """Nobody else's handling shows in one's own error."""
    threaded.script.failing["forward_backward"] = FAILURE
    future = toy.forward_backward([1])
    first, second = future.exception(), future.exception()
    assert first is not second
    assert isinstance(first, errors.OperationFailedError)
    assert first.operation == "forward_backward"
    assert future.get_error() is not None
    assert future.status == "failed"


def test_the_transport_error_is_the_cause(threaded: ThreadedServer, toy: Toy) -> None:
    """What the socket said stands behind what we say."""
    toy.health()
    threaded.call(threaded.script.stop())
    with pytest.raises(errors.ServerUnreachableError) as caught:
        toy.forward_backward([1])
    assert isinstance(caught.value.__cause__, OSError)


def test_cancel_is_the_truth(threaded: ThreadedServer, toy: Toy) -> None:
    """Queued work is cancelled and not executed; done work is not."""
    threaded.script.held.add("forward_backward")
    queued, done = toy.forward_backward([1]), toy.optim_step()
    assert queued.cancel()
    assert queued.status == "cancelled"
    assert not done.cancel()
    with pytest.raises(errors.FutureCancelledError):
        queued.result()
    threaded.release("forward_backward")
    assert threaded.script.operations["fut-1"].status == "cancelled"
    assert done.result() == Numbered(2)


def test_callbacks_run_on_the_bridge_in_order(threaded: ThreadedServer, toy: Toy) -> None:
    """A callback starts the fetching, runs on the home thread, and may be attached late."""
    threaded.script.held.add("forward_backward")
    future = toy.forward_backward([1])
    seen: list[tuple[str, str]] = []
    called = threading.Semaphore(0)

    def note(name: str) -> None:
        seen.append((name, threading.current_thread().name))
        called.release()

    future.add_done_callback(lambda _: note("a"))
    future.add_done_callback(lambda _: note("b"))
    assert seen == []
    threaded.release("forward_backward")
    assert called.acquire(timeout=30)
    assert called.acquire(timeout=30)
    future.add_done_callback(lambda done: note(done.status))
    assert called.acquire(timeout=30)
    assert seen == [("a", "tg-tinker-loop"), ("b", "tg-tinker-loop"), ("completed", "tg-tinker-loop")]


def test_a_callback_that_fails_is_logged(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    """Neither an error nor an exit in a callback ends anything."""
    future = toy.forward_backward([1])
    called = threading.Event()

    def leave(_: object) -> None:
        raise SystemExit(2)

    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(leave)
    future.add_done_callback(lambda _: called.set())
    assert called.wait(30)
    assert "ZeroDivisionError" in caplog.text
    assert "SystemExit" in caplog.text
    assert toy.health()


def test_a_view_for_concurrent_futures(threaded: ThreadedServer, toy: Toy) -> None:
    """``concurrent.futures.wait`` works on views, and cancelling a view cancels nothing."""
    threaded.script.failing["optim_step"] = FAILURE
    good, bad = toy.forward_backward([1]).as_concurrent(), toy.optim_step().as_concurrent()
    assert not good.cancel()
    done, pending = concurrent.futures.wait([good, bad], timeout=30)
    assert len(done) == 2
    assert not pending
    assert good.result() == Numbered(1)
    assert isinstance(bad.exception(), errors.OperationFailedError)


def test_a_forgotten_failure_warns_once(threaded: ThreadedServer, toy: Toy) -> None:
    """A failure that became known and that nobody looked at is reported when the future goes."""
    threaded.script.failing["forward_backward"] = FAILURE
    future = toy.forward_backward([1])
    assert future.wait(30)
    idle()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del future
        gc.collect()
    assert [warning.category for warning in seen] == [errors.UnretrievedOperationWarning]
    assert str(seen[0].message).startswith("forward_backward #1 on run r-1, submitted at client.py:")
    assert str(seen[0].message).endswith("failed and nobody looked at it: out of memory")


@pytest.mark.parametrize("look", ["result", "exception", "get_error", "is_failed", "as_concurrent"])
def test_a_failure_that_was_looked_at_does_not_warn(threaded: ThreadedServer, toy: Toy, look: str) -> None:
    """Looking in any way is looking."""
    threaded.script.failing["forward_backward"] = FAILURE
    future = toy.forward_backward([1])
    assert future.wait(30)
    try:
        seen = getattr(future, look)()
    except errors.OperationFailedError:
        seen = None
    if look == "as_concurrent":
        concurrent.futures.wait([seen])
    idle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del future
        gc.collect()


def test_a_future_never_waited_for_is_dropped_in_silence(threaded: ThreadedServer, toy: Toy) -> None:
    """Fire and forget is allowed: nothing is known, so nothing is said."""
    threaded.script.failing["forward_backward"] = FAILURE
    toy.forward_backward([1])
    idle()
    gc.collect()
    assert threaded.script.polls() == []


def test_pickling_says_what_to_do_instead(toy: Toy) -> None:
    """Neither a future nor a copy of it can travel; its id can."""
    future = toy.forward_backward([1])
    for travel in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"pass future\.id, and call service\.get_future\(id\)"):
            travel(future)


@pytest.mark.parametrize("stream", ["sample_stream", "sample_stream_async"])
def test_a_stream_has_one_reader(toy: Toy, stream: str) -> None:
    """Neither kind of iterator can be copied or pickled: a copy that goes would end what the other one reads."""
    chunks = getattr(toy, stream)("x")
    for travel in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="read it where it was opened"):
            travel(chunks)


def test_a_latch_wakes_everybody_once() -> None:
    """The bit flips once, calls each waker once, and says what it is."""
    latch, woken = Latch(), list[str]()
    forget = latch.when_set(lambda: woken.append("forgotten"))
    latch.when_set(lambda: woken.append("kept"))
    forget()
    assert repr(latch) == "<Latch unset, 1 waiting>"
    assert not latch.wait(0.01)
    latch.set()
    latch.set()
    assert latch.when_set(lambda: woken.append("late")) is not None
    assert woken == ["kept", "late"]
    assert latch.wait()
    assert repr(latch) == "<Latch set>"


def test_waits_may_be_cut_into_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a wait cannot be interrupted, it is many short ones."""
    monkeypatch.setattr(latch_module, "_SLICE", 0.01)
    latch = Latch()
    threading.Timer(0.1, latch.set).start()
    assert latch.wait()
    assert not Latch().wait(0.05)
