"""What all tests share: fixtures by theme, and a guard that no test leaves a thread, a task or a session behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads collapse where other work shares the cores
sys.path.append(str(Path(__file__).parent))  # so that `fixtures` can be imported from every test

from fixtures.server import ThreadedServer, threaded_server  # needs the path above

from tg_tinker import bridge

GRACE = 20.0  # seconds that what a test started may take to wind down on a busy machine

# Property tests take the time they take, draw the same examples on every machine, and leave no files behind.
settings.register_profile(
    "house", deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


def pytest_runtest_setup() -> None:
    """Begin every test, fixtures included, with the same random numbers, for what it draws without a seed."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail a test after which threads, tasks on the bridge or open sessions remain that were not there before."""
    threads, guests = set(threading.enumerate()), _guests()
    yield
    _wait_until_gone("threads", lambda: {one for one in threading.enumerate() if one not in threads and not _ours(one)})
    _wait_until_gone("tasks on the bridge", _bridge_tasks)
    _wait_until_gone("sessions", lambda: _guests() - guests)


def _wait_until_gone(what: str, left: Callable[[], set[object]]) -> None:
    if left():
        gc.collect()  # forgotten clients close what they left open
    deadline = time.monotonic() + GRACE
    while left() and time.monotonic() < deadline:
        time.sleep(0.01)
    if left():
        pytest.fail(f"the test left {what} behind: {left()}")


def _ours(thread: threading.Thread) -> bool:
    """The bridge, and the worker threads that a loop keeps for itself, may stay."""
    return thread.name == "tg-tinker-loop" or thread.name.startswith("asyncio_")


def _bridge_tasks() -> set[object]:
    loop = bridge.ThreadHome().loop()
    return set() if loop is None or loop.is_closed() else set(asyncio.all_tasks(loop))


def _guests() -> set[object]:
    thread = bridge._shared.thread
    return set() if thread is None else set(thread.guests)


@pytest.fixture
def threaded() -> Iterator[ThreadedServer]:
    """A scripted server on a loop of its own, for tests that block."""
    with threaded_server() as server:
        yield server
