"""Forked children: they work beside their parent and hurt nobody, however they leave."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
from fixtures.ended import Ended
from fixtures.server import ThreadedServer

pytestmark = [
    pytest.mark.fork,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork"),
]

Run = Callable[..., Ended]


@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)", "pass"])
def test_a_child_trains_a_step_beside_its_parent(threaded: ThreadedServer, run_program: Run, leave: str) -> None:
    """Both count on the server; the parent goes on undisturbed, whichever way the child leaves."""
    ended = run_program(f"""
        import os, sys, warnings
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # newer Pythons warn of any fork beside threads
        toy.forward_backward([1]).result(30)
        child = os.fork()
        if child == 0:
            print("child", toy.forward_backward([2]).result(30).number, toy.sample("x").number, flush=True)
            print("steps", toy.optim_step().result(30).number > 0, toy.steps, flush=True)
            {leave}
        else:
            _, status = os.waitpid(child, 0)
            print("status", status)
            print("parent", toy.forward_backward([3]).result(30).number)
            print("health", toy.health())
            toy.close()
    """)
    assert ended.err == ""
    assert ended.code == 0
    assert "status 0\n" in ended.out
    assert "steps True 1\n" in ended.out
    assert "health {'status': 'ok'}" in ended.out
    batches = [operation.body["batch"] for operation in threaded.script.accepted("forward_backward")]
    assert batches == [[1], [2], [3]]


def test_a_child_beside_pending_work(threaded: ThreadedServer, run_program: Run) -> None:
    """A parent with an operation in flight and a thread that waits is not disturbed by a child that exits."""
    threaded.script.held.add("optim_step")
    ended = run_program("""
        import os, sys, threading, time, warnings
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        pending = toy.optim_step()
        results = []
        waiting = threading.Thread(target=lambda: results.append(pending.result(30).number))
        waiting.start()
        time.sleep(0.2)
        child = os.fork()
        if child == 0:
            toy.forward_backward([2]).result(30)
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        print("status", status, pending.cancel(), toy.health())
        waiting.join()
    """)
    assert "status 0 True {'status': 'ok'}" in ended.out
    assert "FutureCancelledError" in ended.err, "the waiting thread ended with the cancellation"


def test_inherited_futures_say_where_they_belong(threaded: ThreadedServer, run_program: Run) -> None:
    """A child cannot wait for its parent's future, and is told how to find it again; settled ones just work."""
    threaded.script.held.add("optim_step")
    ended = run_program("""
        import os, warnings
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        done, pending = toy.forward_backward([1]), toy.optim_step()
        done.result(30)
        child = os.fork()
        if child == 0:
            print(done.result().number, pending.done(), pending.status, flush=True)
            for use in (pending.result, pending.cancel, lambda: pending.add_done_callback(print)):
                try:
                    use()
                except Exception as error:
                    print(type(error).__name__, "service.get_future(id)" in str(error), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print("cancelled", pending.cancel())
        toy.close()
    """)
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert lines == ["1 False pending", *["ClientClosedError True"] * 3, "cancelled True"]


def test_a_child_of_a_loop_is_refused(threaded: ThreadedServer, run_program: Run) -> None:
    """A client that lives on its parent's loop says so in the child."""
    ended = run_program("""
        import asyncio, os, warnings
        from fixtures.client import connect_here
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        async def main():
            here = connect_here(toy.core.service.connection.endpoint.base_url)
            await here.health_async()
            child = os.fork()
            if child == 0:
                try:
                    here.forward_backward([1])
                except Exception as error:
                    print(type(error).__name__, "make a new one in this child" in str(error), flush=True)
                os._exit(0)
            os.waitpid(child, 0)
            print("parent", (await here.health_async())["status"])
            await here.aclose()
        asyncio.run(main())
    """)
    assert ended.err == ""
    assert ended.out.splitlines() == ["ClientClosedError True", "parent ok"]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork start method there")
def test_multiprocessing_children_train_too(threaded: ThreadedServer, run_program: Run) -> None:
    """Workers of a fork pool, as data loaders use them, share the client object and not its connection."""
    ended = run_program("""
        import multiprocessing, warnings
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        toy.health()
        def work(number):
            return toy.forward_backward([number]).result(30).number
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(sorted(pool.map(work, range(6))))
            pool.close()
            pool.join()
        print(toy.forward_backward([9]).result(30).number)
        toy.close()
    """)
    assert ended.err == ""
    assert ended.out.splitlines() == ["[1, 2, 3, 4, 5, 6]", "7"]
