"""Bytes that no proper client sends: answered in the wire's words, under an id, with one line in the log at most."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from aiohttp import web
from fixtures.fake_engine import FakeEngine
from fixtures.server_client import KEY

from tg_tinker.server.app import create_app
from tg_tinker.server.connection import listen
from tg_tinker.server.settings import Settings

Send: TypeAlias = Callable[[bytes], Awaitable[bytes]]

AUTHORIZED = b"Host: localhost\r\nConnection: close\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
GET = b"GET /v1/futures HTTP/1.1\r\n"
POST = b"POST /v1/training_clients HTTP/1.1\r\n"


@pytest.fixture
async def send(tmp_path: Path) -> AsyncIterator[Send]:
    """Send bytes to a server that listens as a process does; gives all that it answers until it hangs up."""
    app = create_app(Settings(home=tmp_path, keys={KEY: "tenant-a"}), engine=FakeEngine())
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=2.0)
    await runner.setup()
    server = await listen(runner, "127.0.0.1", 0)

    async def send(sent: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        try:
            writer.write(sent)
            async with asyncio.timeout(20):
                return await reader.read()
        finally:
            writer.close()

    try:
        yield send
    finally:
        server.close()
        await runner.cleanup()


def refused(answer: bytes, status: int, code: str) -> str:
    """The request id of an answer that must be our error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines[1:])
    error = json.loads(body)["error"]
    assert lines[0].split()[1] == str(status)
    assert fields["Content-Type"] == "application/json"
    assert error["code"] == code
    assert error["request_id"] == fields["X-Request-Id"] != ""
    return str(error["request_id"])


NO_HTTP = {
    "not a method": b"\x16\x03\x01\x00\xa5\r\n\r\n",
    "another protocol": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /v1/futures HTTP/9.9\r\n" + AUTHORIZED + b"\r\n",
    "no path": b"GET /\xff HTTP/1.1\r\n" + AUTHORIZED + b"\r\n",
    "a long header": GET + AUTHORIZED + b"X-A: " + b"a" * 20_000 + b"\r\n\r\n",
    "a broken header": GET + AUTHORIZED + b"X-A: a\x00b\r\n\r\n",
    "two lengths": POST + AUTHORIZED + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "two framings": POST + AUTHORIZED + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    "no chunk": POST + AUTHORIZED + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
}


@pytest.mark.parametrize("sent", NO_HTTP.values(), ids=NO_HTTP)
async def test_what_is_no_http_is_answered_like_everything_else(send, caplog, sent):
    """Bytes that cannot be parsed get our error body under a request id, which one line of the log repeats."""
    request_id = refused(await send(sent), 400, "HTTP_400")
    (record,) = caplog.records
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)
    assert f"[{request_id}]" in record.getMessage()
    assert json.loads((await send(GET + AUTHORIZED + b"\r\n")).partition(b"\r\n\r\n")[2]) == []


async def test_the_log_does_not_repeat_a_broken_key(send, caplog):
    """A header that cannot be parsed may be the one with the key: no word of it is logged or answered."""
    answer = await send(GET + b"Host: localhost\r\nAuthorization: Bearer secret\x00word\r\n\r\n")
    refused(answer, 400, "HTTP_400")
    assert "secret" not in caplog.text
    assert b"secret" not in answer


async def test_a_url_that_is_none_costs_one_line(send, caplog):
    """Where aiohttp's parser breaks down, the connection ends; no traceback, and the server goes on."""
    answer = await send(b"GET http://[/v1/futures HTTP/1.1\r\n" + AUTHORIZED + b"\r\n")
    assert answer == b"" or refused(answer, 400, "HTTP_400")  # that of 3.14 says what is wrong
    (record,) = caplog.records
    assert (record.name, record.exc_info) == ("tg_tinker.server", None)
    assert b" 200 OK" in await send(GET + AUTHORIZED + b"\r\n")


async def test_an_unknown_expectation_is_refused_by_name(send):
    """An Expect header other than 100-continue is a typed error; the client's own request id comes back."""
    answer = await send(POST + AUTHORIZED + b"X-Request-Id: mine\r\nExpect: magic\r\nContent-Length: 2\r\n\r\n{}")
    assert refused(answer, 417, "HTTP_417") == "mine"
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["details"]["field"] == "Expect"


async def test_a_request_without_a_host_asks_no_name_server(send, monkeypatch):
    """A client of HTTP/1.0 is served, and the server does not look its own name up for it, which could take seconds."""
    monkeypatch.setattr("socket.getfqdn", lambda *_: 1 / 0)
    assert b" 200 OK" in await send(b"GET /healthz HTTP/1.0\r\n\r\n")
