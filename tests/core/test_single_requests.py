"""One request and what a network does to it that no server of ours could be made to do."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aioresponses import aioresponses
from fixtures.client import QUICK
from yarl import URL

from tg_tinker.bridge import LoopHome
from tg_tinker.core.endpoint import FixedEndpoint
from tg_tinker.core.transport import Connection, Request
from tg_tinker.errors import InvalidRequestError, ServerUnreachableError

PLACE = "http://server.test/v1/things"
SUBMIT = Request(method="POST", path="/v1/things", body=b'{"a": 1}', key="once")
HOST: Any = SimpleNamespace(host="server.test", port=443, ssl=True, is_ssl=True)  # what aiohttp keeps of a connection

PASSING = {
    "no such name, for now": aiohttp.ClientConnectorDNSError(HOST, OSError(-3, "try again")),
    "refused": aiohttp.ClientConnectorError(HOST, ConnectionRefusedError(111, "refused")),
    "reset": aiohttp.ClientOSError(104, "reset by peer"),
    "hung up": aiohttp.ServerDisconnectedError(),
    "cut off": aiohttp.ClientPayloadError("not all of it came"),
    "too slow to connect": aiohttp.ConnectionTimeoutError(),
    "too slow to answer": aiohttp.SocketTimeoutError(),
}
LASTING = {
    "a certificate": aiohttp.ClientConnectorCertificateError(HOST, ssl.SSLCertVerificationError(1, "self-signed")),
    "a URL": aiohttp.InvalidURL("http://["),
}


@pytest.fixture
def network() -> Iterator[aioresponses]:
    """Answers by script, in place of every request."""
    with aioresponses() as scripted:
        yield scripted


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    """A connection to where nobody is."""
    connection = Connection(FixedEndpoint("http://server.test", "key-1"), LoopHome(), policy=QUICK)
    yield connection
    await connection.aclose()


def sent(network: aioresponses) -> list[dict[str, Any]]:
    """What each try was sent with."""
    return [call.kwargs for call in network.requests.get(("POST", URL(PLACE)), [])]


async def test_every_try_of_a_request_is_the_same(network: aioresponses, connection: Connection) -> None:
    """Body and idempotency key do not change from try to try, so that a server counts one operation."""
    for status in (503, 429, 408, 200):
        network.post(PLACE, status=status, payload={"done": status == 200})
    assert (await connection.send(SUBMIT)).json() == {"done": True}
    tries = [(one["data"], one["headers"]["Idempotency-Key"], one["headers"]["Authorization"]) for one in sent(network)]
    assert tries == [(b'{"a": 1}', "once", "Bearer key-1")] * 4


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
async def test_what_may_pass_is_tried_again(network: aioresponses, connection: Connection, fault: Exception) -> None:
    """A connection that could not be made, or broke, costs another try; in the end the error keeps the last cause."""
    network.post(PLACE, exception=fault)
    network.post(PLACE, payload={})
    assert (await connection.send(SUBMIT)).status == 200
    assert len(sent(network)) == 2
    network.post(PLACE, exception=fault, repeat=True)
    with pytest.raises(ServerUnreachableError, match=r"no answer from http://server\.test/v1/things: .") as caught:
        await connection.send(SUBMIT)
    assert caught.value.__cause__ is fault
    assert len(sent(network)) == 2 + 1 + QUICK.count


@pytest.mark.parametrize("fault", LASTING.values(), ids=LASTING)
async def test_what_cannot_pass_fails_at_once(network: aioresponses, connection: Connection, fault: Exception) -> None:
    """Nobody waits for retries that cannot go better; the error says what was wrong."""
    network.post(PLACE, exception=fault, repeat=True)
    with pytest.raises(ServerUnreachableError, match=r"self-signed|http://\["):
        await connection.send(SUBMIT)
    assert len(sent(network)) == 1


async def test_a_refusal_is_not_tried_again(network: aioresponses, connection: Connection) -> None:
    """What the server says is wrong with a request is the caller's to mend: one try, and its typed error."""
    body = {"error": {"code": "INVALID_REQUEST", "message": "rank: no", "details": {"field": "rank"}}}
    network.post(PLACE, status=422, payload=body, repeat=True)
    with pytest.raises(InvalidRequestError, match="rank: no") as caught:
        await connection.send(SUBMIT)
    assert (caught.value.field, len(sent(network))) == ("rank", 1)
