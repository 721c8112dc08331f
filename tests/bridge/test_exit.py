"""How programs end: quickly, quietly, with their own exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from fixtures.ended import Ended
from fixtures.server import ThreadedServer

Run = Callable[..., Ended]
Start = Callable[..., "subprocess.Popen[str]"]
QUICK = 20.0  # seconds: less than a poll is held, which is what a program must not wait for


def quiet(ended: Ended, code: int = 0) -> None:
    """It waited for nothing at its end, had its code, and said nothing on stderr."""
    assert ended.err == ""
    assert ended.code == code
    assert ended.seconds < QUICK


def test_exit_with_pending_futures(threaded: ThreadedServer, run_program: Run) -> None:
    """Futures that nobody awaited, are being polled, or have callbacks do not hold up the exit."""
    threaded.script.held.update({"forward_backward", "optim_step"})
    ended = run_program("""
        idle = toy.forward_backward([1])
        polled = toy.optim_step()
        polled.wait(0.1)
        called = toy.optim_step()
        called.add_done_callback(lambda future: None)
        stream = toy.sample_stream("x")
        next(stream)
        print("exiting")
    """)
    quiet(ended)


def test_exit_with_a_daemon_thread_waiting(threaded: ThreadedServer, run_program: Run) -> None:
    """A daemon thread blocked in ``.result()`` does not keep the process alive."""
    threaded.script.held.add("forward_backward")
    ended = run_program("""
        import threading, time
        future = toy.forward_backward([1])
        threading.Thread(target=future.wait, daemon=True).start()
        time.sleep(0.1)
        print("exiting")
    """)
    quiet(ended)


def test_exit_after_close(run_program: Run) -> None:
    """A tidy program ends tidily."""
    quiet(run_program("toy.health(); toy.close(); print('exiting')"))


def test_exit_without_close(run_program: Run) -> None:
    """At interpreter exit an unclosed client is closed silently."""
    quiet(run_program("toy.health(); print('exiting')"))


def test_exit_without_any_call(run_program: Run) -> None:
    """A client that was made and never used starts nothing and leaves nothing."""
    quiet(run_program("import threading; assert threading.active_count() == 1; print('exiting')"))


def test_sys_exit_keeps_its_code(threaded: ThreadedServer, run_program: Run) -> None:
    """The exit code is the program's."""
    threaded.script.held.add("forward_backward")
    quiet(run_program("import sys; f = toy.forward_backward([1]); print('exiting'); sys.exit(7)"), 7)


def test_exit_handlers_of_the_program_still_have_the_client(run_program: Run) -> None:
    """Handlers that the program registered run before the bridge ends, so they may save their work."""
    ended = run_program("""
        import atexit
        toy.health()
        atexit.register(lambda: print("saved", toy.forward_backward([1]).result(5).number))
        print("exiting")
    """)
    quiet(ended)
    assert "saved 1" in ended.out


def test_exit_of_an_async_program(threaded: ThreadedServer, run_program: Run) -> None:
    """``asyncio.run`` with a client of the bridge, left with a future pending, ends as quickly."""
    threaded.script.held.add("forward_backward")
    ended = run_program("""
        import asyncio
        async def main():
            future = await toy.forward_backward_async([1])
            try:
                await asyncio.wait_for(future, 0.1)
            except TimeoutError:
                print("exiting")
        asyncio.run(main())
    """)
    quiet(ended)


def test_use_from_a_late_exit_handler_is_an_error_not_a_hang(run_program: Run) -> None:
    """Once the bridge has ended, a call says that the interpreter is shutting down."""
    ended = run_program(
        """
        import atexit, sys
        def late():
            try:
                toy.health()
            except Exception as error:
                print(type(error).__name__, error)
        atexit.register(late)  # before the import below, so it runs after the bridge's own handler
        sys.path.append({tests!r})
        from fixtures.client import connect
        toy = connect({url!r})
        toy.health()
        print("exiting")
        """,
        with_client=False,
    )
    quiet(ended)
    assert "ClientClosedError the interpreter is shutting down" in ended.out


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is delivered to process groups there")
def test_ctrl_c_leaves_result_and_not_the_operation(threaded: ThreadedServer, start_program: Start) -> None:
    """Ctrl-C ends the wait at once; the same future gives its result afterwards."""
    threaded.script.held.add("forward_backward")
    program = start_program("""
        import time
        future = toy.forward_backward([1])
        print("waiting", flush=True)
        try:
            future.result()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        print(future.result(20).number, flush=True)
        toy.close()
    """)
    assert program.stdout is not None
    assert program.stdout.readline() == "waiting\n"
    while not threaded.script.polls():
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    assert program.stdout.readline() == "interrupted\n"
    threaded.release("forward_backward")
    assert program.stdout.readline() == "1\n"
    _, err = program.communicate(timeout=30)
    assert (program.returncode, err) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is delivered to process groups there")
def test_ctrl_c_in_a_direct_call_takes_it_back(threaded: ThreadedServer, start_program: Start) -> None:
    """Without a handle the work is cancelled on the server, within a second, and Ctrl-C is raised."""
    threaded.script.held.add("sample")
    program = start_program("""
        print("sampling", flush=True)
        try:
            toy.sample("x")
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        toy.close()
    """)
    assert program.stdout is not None
    assert program.stdout.readline() == "sampling\n"
    while not threaded.script.polls():
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    assert program.stdout.readline() == "interrupted\n"
    _, err = program.communicate(timeout=30)
    assert (program.returncode, err) == (0, "")
    assert threaded.script.operations["fut-1"].status == "cancelled"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is delivered to process groups there")
def test_ctrl_c_during_a_submit_leaves_it_to_itself(threaded: ThreadedServer, start_program: Start) -> None:
    """The acceptance is not awaited, the submit goes on, and the next one is not held up."""
    from fixtures import faults

    go_on = asyncio.Event()
    threaded.script.faults["forward_backward"].append(faults.until(go_on))
    program = start_program("""
        print("submitting", flush=True)
        try:
            toy.forward_backward([1])
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        print(toy.optim_step().result(10).number, toy.core.orphans, flush=True)
        toy.close()
    """)
    assert program.stdout is not None
    assert program.stdout.readline() == "submitting\n"
    while not threaded.script.requests:
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    assert program.stdout.readline() == "interrupted\n"
    threaded.loop.call_soon_threadsafe(go_on.set)
    assert program.stdout.readline() == "2 [<OperationFuture forward_backward fut-1: pending>]\n"
    _, err = program.communicate(timeout=30)
    assert program.returncode == 0
    assert "was accepted by the server though its caller had been cancelled" in err


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_terminated_program_ends(threaded: ThreadedServer, start_program: Start) -> None:
    """SIGTERM is the program's own affair: nothing of ours catches it."""
    program = start_program("import time; toy.health(); print('up', flush=True); time.sleep(60)")
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    program.terminate()
    program.communicate(timeout=30)
    assert program.returncode == -signal.SIGTERM
