"""Blocking calls: where they work, where they warn, and where they refuse."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
import warnings
from collections.abc import Callable

import pytest
from fixtures.client import Numbered, Toy, connect, connect_here, idle
from fixtures.server import ThreadedServer

from tg_tinker import bridge, errors
from tg_tinker.bridge import LoopHome, ThreadHome


def test_submit_wait_and_direct_calls(toy: Toy) -> None:
    """A plain program: submit, result, a direct call, a stream."""
    future = toy.forward_backward([1])
    assert future.id == "fut-1", "where no loop runs, the call waits for the acceptance"
    assert future.result(timeout=30) == Numbered(1)
    assert toy.optim_step().result() == Numbered(2)
    assert toy.steps == 1
    assert toy.sample("x") == Numbered(3)
    assert toy.health() == {"status": "ok"}


def test_a_rejection_surfaces_at_the_call(threaded: ThreadedServer, toy: Toy) -> None:
    """Where no loop runs, the server's refusal is raised by the submit itself."""
    from fixtures import faults

    threaded.script.faults["forward_backward"].append(faults.status(422))
    with pytest.raises(errors.InvalidRequestError) as caught:
        toy.forward_backward([1])
    assert caught.value.__notes__[0].startswith("forward_backward #1 on run r-1, submitted at client.py:")
    threaded.script.faults["sample_stream"].append(faults.status(422))
    with pytest.raises(errors.InvalidRequestError):
        toy.sample_stream("x")


def test_own_loop_raises_at_once() -> None:
    """Blocking the loop that has to do the work is refused, for every blocking face."""
    calls = []

    async def main() -> None:
        from fixtures.server import ScriptedServer

        server = ScriptedServer()
        await server.start()
        toy = connect_here(server.url)
        server.held.add("forward_backward")
        future = toy.forward_backward([1])
        for use in (
            future.result,
            lambda: future.result(timeout=1),
            future.wait,
            future.exception,
            future.cancel,
            toy.health,
            lambda: toy.sample("x"),
            lambda: next(toy.sample_stream("x")),
            toy.close,
        ):
            with pytest.raises(errors.BlockingCallError, match="would block the event loop"):
                use()
            calls.append(use)
        assert server.accepted("sample") == []
        server.release("forward_backward")
        assert await future == Numbered(1)
        assert future.result() == Numbered(1), "a settled future blocks nobody"
        await toy.aclose()
        await server.stop()

    asyncio.run(main())
    assert len(calls) == 9


def test_the_bridge_refuses_to_wait_for_itself(
    threaded: ThreadedServer, toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback runs on the bridge: blocking there is an error that is logged, not a deadlock."""
    threaded.script.held.add("forward_backward")
    pending = toy.forward_backward([1])
    done = toy.optim_step()
    called = threading.Event()

    def callback(_: object) -> None:
        try:
            pending.result()
        finally:
            called.set()

    done.add_done_callback(callback)
    assert called.wait(30)
    assert toy.health()
    assert "BlockingCallError" in caplog.text


def test_a_loop_that_nobody_runs_is_not_waited_for() -> None:
    """A client whose loop has stopped says so, at the call and before anything is sent."""

    async def make() -> LoopHome:
        return LoopHome()

    loop = asyncio.new_event_loop()
    home = loop.run_until_complete(make())
    toy = connect("http://127.0.0.1:9", home)
    with pytest.raises(errors.BlockingCallError, match="event loop is not running"):
        toy.forward_backward([1])
    with pytest.raises(errors.BlockingCallError):
        toy.health()
    loop.close()
    with pytest.raises(errors.ClientClosedError, match="event loop that this client lives on is closed"):
        home.call_soon(print)


def test_a_foreign_loop_warns_and_works(toy: Toy) -> None:
    """Inside somebody else's loop a blocking call works, and names the line and the remedy once."""

    async def main() -> None:
        for _ in range(3):
            assert toy.health() == {"status": "ok"}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        asyncio.run(main())
    assert [warning.category for warning in caught] == [errors.BlockingCallWarning]
    assert caught[0].filename == __file__
    assert "health() blocks a running event loop: await it, or its *_async form" in str(caught[0].message)


def test_a_notebook_is_not_warned(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under IPython all user code runs inside a loop: the warning would mean nothing."""
    ipython = types.SimpleNamespace(get_ipython=object)
    monkeypatch.setitem(sys.modules, "IPython", ipython)

    async def main() -> None:
        assert toy.optim_step().result() == Numbered(1)

    asyncio.run(main())


def test_a_submit_inside_a_loop_returns_at_once(threaded: ThreadedServer, toy: Toy) -> None:
    """In a coroutine the plain form does not wait for the server; awaiting the future does."""
    from fixtures import faults

    answer = asyncio.Event()
    threaded.script.faults["forward_backward"].append(faults.until(answer))

    async def main() -> None:
        future = toy.forward_backward([1])
        assert future.id == ""
        threaded.loop.call_soon_threadsafe(answer.set)
        assert (await future) == Numbered(1)
        assert future.id == "fut-1"

    asyncio.run(main())


def test_four_waiters_on_three_loops_and_a_thread(threaded: ThreadedServer, toy: Toy) -> None:
    """One future wakes everybody, wherever they wait, with one poll."""
    threaded.script.held.add("forward_backward")
    future = toy.forward_backward([1])
    results: list[Numbered] = []

    async def wait() -> None:
        results.append(await future)

    waiters = [threading.Thread(target=lambda: asyncio.run(wait())) for _ in range(3)]
    waiters.append(threading.Thread(target=lambda: results.append(future.result())))
    for waiter in waiters:
        waiter.start()
    while not threaded.script.polls():
        threading.Event().wait(0.01)
    threaded.release("forward_backward")
    for waiter in waiters:
        waiter.join(30)
    assert results == [Numbered(1)] * 4
    assert len(threaded.script.polls()) == 1


def test_a_waiter_whose_loop_closed_is_skipped(threaded: ThreadedServer, toy: Toy) -> None:
    """A loop that ended without its waiter does not keep the others from being woken."""
    threaded.script.held.add("forward_backward")
    future = toy.forward_backward([1])
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(future.result_async())
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()
    threaded.release("forward_backward")
    assert future.result(30) == Numbered(1)
    assert not waiting.done()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.get_coro().close()


def test_program_order_across_threads(threaded: ThreadedServer, toy: Toy) -> None:
    """Submits of several threads keep, for each thread, the order of its calls."""

    def work(first: int) -> None:
        for number in range(first, first + 10):
            toy.forward_backward([number])

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    seen = [operation.body["batch"][0] for operation in threaded.script.accepted("forward_backward")]
    assert len(seen) == 30
    for first in (0, 100, 200):
        mine = [number for number in seen if first <= number < first + 10]
        assert mine == sorted(mine)


def test_mixed_sync_and_async_use(threaded: ThreadedServer, toy: Toy) -> None:
    """Threads that block and coroutines that await share one client without waiting for each other for ever."""

    def blocks() -> None:
        for _ in range(10):
            toy.forward_backward([1]).result(30)

    async def awaits() -> None:
        for _ in range(10):
            future = await toy.forward_backward_async([1])
            await future

    async def main() -> None:
        await asyncio.gather(*(asyncio.to_thread(blocks) for _ in range(3)), awaits(), awaits())

    asyncio.run(main())
    assert len(threaded.script.accepted("forward_backward")) == 50


def test_direct_calls_from_a_foreign_loop(threaded: ThreadedServer, toy: Toy) -> None:
    """Awaiting a client of the bridge hops there; cancelling the caller cancels the work."""

    async def main() -> None:
        assert await toy.health_async() == {"status": "ok"}
        threaded.script.held.add("sample")
        sampling = asyncio.ensure_future(toy.sample_async("x"))
        while not threaded.script.polls():
            await asyncio.sleep(0.01)
        sampling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sampling

    asyncio.run(main())
    assert threaded.script.operations["fut-1"].status == "cancelled"


def test_errors_cross_the_bridge_with_short_tracebacks(threaded: ThreadedServer, toy: Toy) -> None:
    """The traceback of a direct call shows the user's line and three of ours at most."""
    from fixtures import faults

    def depth(error: BaseException) -> int:
        frames = 0
        trace = error.__traceback__
        while trace is not None:
            frames += "tg_tinker" in trace.tb_frame.f_code.co_filename.replace("\\", "/").split("/")
            trace = trace.tb_next
        return frames

    threaded.script.faults["healthz"].append(faults.status(403))
    with pytest.raises(errors.AuthorizationError) as caught:
        toy.health()
    assert depth(caught.value) <= 3

    async def main() -> None:
        threaded.script.faults["healthz"].append(faults.status(403))
        with pytest.raises(errors.AuthorizationError) as caught:
            await toy.health_async()
        assert depth(caught.value) <= 3

    asyncio.run(main())


def test_a_sync_stream_broken_off_closes_its_source(threaded: ThreadedServer, toy: Toy) -> None:
    """Leaving a for loop at the third chunk ends the generation on the server."""
    for chunk in toy.sample_stream("x"):
        if chunk.number == 3:
            break
    while not threaded.script.disconnects:
        threading.Event().wait(0.01)


def test_a_sync_stream_is_read_to_its_end(threaded: ThreadedServer, toy: Toy) -> None:
    """All chunks come, then StopIteration, again and again."""
    threaded.script.chunks = 30
    chunks = toy.sample_stream("x")
    assert [chunk.number for chunk in chunks] == list(range(30))
    assert next(chunks, None) is None
    chunks.close()  # type: ignore[attr-defined]


def test_composed_operations_block_too(threaded: ThreadedServer, toy: Toy) -> None:
    """The future of a composed operation works from a plain program."""
    threaded.script.served_version = 1
    future = toy.publish("a")
    assert future.id == "fut-1"
    assert future.result(30) == "a@1"


def test_exit_exceptions_in_the_background_stay_there(toy: Toy) -> None:
    """``SystemExit`` raised in work at home reaches the caller, and the bridge goes on."""

    async def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        toy.core.home.run(leave())
    assert toy.health() == {"status": "ok"}


def test_an_exit_inside_a_composed_operation_settles_its_future(threaded: ThreadedServer, toy: Toy) -> None:
    """Code that calls ``sys.exit`` on the bridge becomes the operation's failure."""
    from fixtures.client import FORWARD_BACKWARD

    from tg_tinker.core.call import Composed, call
    from tg_tinker.core.compose import compose

    async def leave(_: Numbered) -> None:
        raise SystemExit(3)

    first = call(FORWARD_BACKWARD, {}, base=toy.base)
    future = compose(toy.core, Composed(first=first, then=leave, operation="custom"))
    with pytest.raises(errors.OperationFailedError, match="SystemExit was raised in the background: 3"):
        future.result(30)


def test_a_loop_thread_that_ended_is_replaced(threaded: ThreadedServer, toy: Toy) -> None:
    """What waits is told; the next call starts another thread and connects anew."""
    threaded.script.held.add("forward_backward")
    pending = toy.forward_backward([1])
    result: list[BaseException | None] = []
    waiting = threading.Thread(target=lambda: result.append(pending.exception()))
    waiting.start()
    while not threaded.script.polls():
        threading.Event().wait(0.01)
    bridge.shutdown()
    waiting.join(30)
    assert isinstance(result[0], errors.ClientClosedError)
    assert toy.health() == {"status": "ok"}


def test_an_exception_that_ends_the_loop_is_logged(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    """Even a callback that raises SystemExit on the loop leaves the client usable."""

    def leave() -> None:
        raise SystemExit(4)

    assert toy.health()
    before = ThreadHome().loop()
    toy.core.home.call_soon(leave)
    while not bridge._shared.thread.ended:  # type: ignore[union-attr]
        threading.Event().wait(0.01)
    assert toy.health() == {"status": "ok"}
    assert ThreadHome().loop() is not before
    assert "the loop thread was ended by an exception" in caplog.text


def test_an_unclosed_client_says_where_it_was_made(threaded: ThreadedServer) -> None:
    """A client that is dropped while open warns with its line, and its connections are closed."""
    toy = connect(threaded.script.url)
    toy.health()
    idle()
    with pytest.warns(ResourceWarning, match=r"unclosed ServiceClient, made at client\.py:\d+"):
        del toy


def test_a_client_that_never_connected_may_be_dropped(threaded: ThreadedServer) -> None:
    """Nothing was opened, so there is nothing to warn about."""
    connect(threaded.script.url)


def test_trio_gets_a_clear_error(threaded: ThreadedServer, toy: Toy) -> None:
    """Awaiting under another event loop says that asyncio is needed."""
    threaded.script.held.add("forward_backward")
    future = toy.forward_backward([1])
    coroutine = future.result_async()
    with pytest.raises(errors.TGTinkerError, match="under asyncio only") as caught:
        coroutine.send(None)
    assert caught.value.code == "ASYNCIO_REQUIRED"


def test_a_client_per_step_leaks_nothing(threaded: ThreadedServer, toy: Toy) -> None:
    """Views of one service share its connection: a thousand of them cost no thread and no session."""
    from tg_tinker.core.run import RunCore

    toy.health()
    threads, sessions = threading.active_count(), len(threaded.script.requests)
    for _ in range(1000):
        RunCore(toy.core.service, toy.core.retrieval)
    assert threading.active_count() == threads
    assert len(threaded.script.requests) == sessions
    assert len(toy.core.service.runs) == 1


def test_blocking_from_a_thread_beside_the_home_loop() -> None:
    """A client on the caller's loop can be used, blocking, from other threads."""

    async def main() -> None:
        from fixtures.server import ScriptedServer

        server = ScriptedServer()
        await server.start()
        toy = connect_here(server.url)

        def work() -> tuple[Numbered, dict[str, object]]:
            return toy.forward_backward([1]).result(30), toy.health()

        assert await asyncio.to_thread(work) == (Numbered(1), {"status": "ok"})
        await toy.aclose()
        await server.stop()

    asyncio.run(main())


USES: list[Callable[[Toy], object]] = [
    lambda toy: toy.forward_backward([1]),
    lambda toy: toy.sample("x"),
    lambda toy: toy.health(),
    lambda toy: toy.sample_stream("x"),
    lambda toy: toy.publish("x"),
]


@pytest.mark.parametrize("use", USES)
def test_use_after_close(threaded: ThreadedServer, use: Callable[[Toy], object]) -> None:
    """A closed client refuses at the call."""
    toy = connect(threaded.script.url)
    toy.health()
    toy.close()
    toy.close()
    with pytest.raises(errors.ClientClosedError):
        use(toy)
