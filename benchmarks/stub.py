"""A server that answers at once, whatever it is asked: what is left to measure is the client.

``python -m benchmarks.stub`` prints its URL and ends when its standard input does. It speaks both wires, checks
nothing, and spends as little CPU as it can: the client under test shares the machine with it.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from types import TracebackType
from typing import Self
from urllib.request import urlopen

from benchmarks import stub_answers
from benchmarks.measure import environment

_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)


class StubProtocol(asyncio.Protocol):
    """One connection: cuts requests out of the bytes and answers each from the table."""

    requests = 0
    bytes_in = 0
    bytes_out = 0

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._wanted = 0  # bytes of the request that is arriving; 0 while its head is not complete
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Collect, and answer every request that is complete."""
        self._buffer += data
        while self._complete():
            head_end = self._buffer.index(b"\r\n\r\n")
            method, target, _ = bytes(self._buffer[: self._buffer.index(b"\r\n")]).split(b" ", 2)
            size, self._wanted = self._wanted, 0
            del self._buffer[:size]
            self._answer(f"{method.decode()} {target.decode().partition('?')[0]}", size - head_end - 4)

    def _complete(self) -> bool:
        if not self._wanted:
            head_end = self._buffer.find(b"\r\n\r\n")
            if head_end < 0:
                return False
            length = _LENGTH.search(self._buffer, 0, head_end)
            self._wanted = head_end + 4 + (int(length[1]) if length else 0)
        return len(self._buffer) >= self._wanted

    def _answer(self, asked: str, body_size: int) -> None:
        assert self._transport is not None
        if asked == "GET /stats":
            counts = {"requests": StubProtocol.requests, "in": StubProtocol.bytes_in, "out": StubProtocol.bytes_out}
            answer = stub_answers.respond(counts)
        else:
            answer = stub_answers.find(asked, body_size)
            StubProtocol.requests += 1
            StubProtocol.bytes_in += body_size
            StubProtocol.bytes_out += len(answer)
        self._transport.write(answer)


class StubProcess:
    """The stub in a process of its own, and what it counted."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stub"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().decode().strip()

    def __enter__(self) -> Self:
        """It listens."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def counts(self) -> dict[str, int]:
        """Requests, and bytes of bodies in and of answers out, since it started."""
        with urlopen(f"{self.url}/stats", timeout=30) as answer:  # noqa: S310 - our own process
            counts: dict[str, int] = json.load(answer)
        return counts


async def serve() -> None:
    """Listen on a free port of the loopback interface until standard input ends."""
    server = await asyncio.get_running_loop().create_server(StubProtocol, "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve())
