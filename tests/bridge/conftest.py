"""Blocking clients on the bridge thread, and programs run as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures.client import Toy, connect
from fixtures.ended import Ended
from fixtures.server import ThreadedServer

TESTS = Path(__file__).parent.parent
# A shell without job control starts its background jobs deaf to Ctrl-C, and their children inherit that.
HEADER = """
import logging, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.getLogger("asyncio").addFilter(lambda record: "took" not in record.msg)  # that the machine is busy is no fault
sys.path.append({tests!r})
from fixtures.client import connect
toy = connect({url!r})
"""


@pytest.fixture
def toy(threaded: ThreadedServer) -> Iterator[Toy]:
    """A client on the bridge thread."""
    client = connect(threaded.script.url)
    yield client
    client.close()


@pytest.fixture
def start_program(threaded: ThreadedServer) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a program that has ``toy``, a client of the scripted server, under ``-X dev``."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *, with_client: bool = True) -> subprocess.Popen[str]:
        places = {"tests": str(TESTS), "url": threaded.script.url}
        code = textwrap.dedent(code)
        code = HEADER.format(**places) + code if with_client else code.format(**places)
        program = subprocess.Popen(
            [sys.executable, "-X", "dev", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        started.append(program)
        return program

    yield start
    for program in started:
        if program.poll() is None:
            program.kill()
        program.communicate()


@pytest.fixture
def run_program(start_program: Callable[..., subprocess.Popen[str]]) -> Callable[..., Ended]:
    """Run such a program to its end; ``seconds`` counts from its line "exiting"."""

    def run(code: str, *, with_client: bool = True) -> Ended:
        import time

        program = start_program(code, with_client=with_client)
        assert program.stdout is not None
        lines: list[str] = []
        started = time.monotonic()
        for line in program.stdout:
            lines.append(line)
            if line.startswith("exiting"):
                started = time.monotonic()
        _, err = program.communicate(timeout=30)
        return Ended(program.returncode, "".join(lines), err, time.monotonic() - started)

    return run
