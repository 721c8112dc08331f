"""Requests that go wrong: what is tried again, what is not, and which error it becomes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import aiohttp
import pytest
from fixtures import faults
from fixtures.client import FORWARD_BACKWARD, HEALTH, QUICK, TG, Toy, connect_here
from fixtures.server import ScriptedServer

from tg_tinker import errors
from tg_tinker.bridge import LoopHome
from tg_tinker.core import transport
from tg_tinker.core.call import call
from tg_tinker.core.endpoint import FixedEndpoint
from tg_tinker.core.reply import Reply
from tg_tinker.core.transport import Connection, Request, RetryPolicy

HEALTHY = Request(method="GET", path="/healthz")


@pytest.fixture
async def connection(server: ScriptedServer) -> AsyncIterator[Connection]:
    """One connection to the scripted server."""
    connection = Connection(FixedEndpoint(server.url + "/", "key-1"), LoopHome(), policy=QUICK, headers={"X-Mine": "1"})
    yield connection
    await connection.aclose()


@pytest.mark.parametrize("fault", [faults.accept_then_drop(), faults.half_answer()])
async def test_a_reply_lost_after_acceptance_never_trains_twice(
    server: ScriptedServer, toy: Toy, fault: faults.Fault
) -> None:
    """The retry carries the same idempotency key, so the server counts one operation."""
    server.faults["forward_backward"].append(fault)
    assert (await toy.forward_backward([1])).number == 1
    assert len(server.accepted("forward_backward")) == 1
    keys = {headers.get("Idempotency-Key") for headers in server.headers if headers.get("Idempotency-Key")}
    assert len(keys) == 1


@pytest.mark.parametrize("fault", [faults.reset(), *(faults.status(code) for code in (408, 429, 502, 503, 504))])
async def test_transient_faults_are_tried_again(server: ScriptedServer, toy: Toy, fault: faults.Fault) -> None:
    """A reset, and the statuses that mean "later", do not reach the caller."""
    server.faults["forward_backward"].extend([fault, fault])
    assert (await toy.forward_backward([1])).number == 1


async def test_retry_after_is_honoured(server: ScriptedServer, toy: Toy) -> None:
    """The next try comes no earlier than the server asked for."""
    server.faults["optim_step"].append(faults.status(429, Retry_After="0.3"))
    started = asyncio.get_running_loop().time()
    await toy.optim_step()
    assert asyncio.get_running_loop().time() - started >= 0.3


async def test_a_retry_after_beyond_the_patience_fails_at_once(server: ScriptedServer, toy: Toy) -> None:
    """Nobody waits a minute for a server that says so: the error carries how long it asks for."""
    body = {"error": {"code": "QUEUE_FULL", "message": "full", "details": {}, "request_id": "req-9"}}
    server.faults["optim_step"].append(faults.status(503, body, Retry_After="60"))
    with pytest.raises(errors.QueueFullError) as caught:
        await toy.optim_step()
    assert caught.value.retry_after == 60
    assert caught.value.request_id == "req-9"


async def test_tries_end_with_the_timeout_that_was_asked_for(server: ScriptedServer) -> None:
    """Who gives the server little time waits no longer for another try, however patient the retries would be."""
    hurried = Connection(FixedEndpoint(server.url), LoopHome(), policy=RetryPolicy(patience=60.0), timeout=20.0)
    server.faults["healthz"].extend([faults.status(503, Retry_After="30")] * 2)
    with pytest.raises(errors.ServerError):
        await hurried.send(HEALTHY)
    assert len(server.requests) == 1
    await hurried.aclose()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidRequestError),
        (401, errors.AuthenticationError),
        (403, errors.AuthorizationError),
        (404, errors.ResourceNotFoundError),
        (409, errors.TGTinkerError),
        (413, errors.InvalidRequestError),
        (422, errors.InvalidRequestError),
        (500, errors.ServerError),
        (302, errors.ServerError),
    ],
)
async def test_other_refusals_fail_at_once_with_their_class(
    server: ScriptedServer, toy: Toy, status: int, kind: type[errors.TGTinkerError]
) -> None:
    """One request, one typed error."""
    server.faults["forward_backward"].append(faults.status(status))
    with pytest.raises(kind) as caught:
        await toy.forward_backward([1])
    assert type(caught.value) is kind
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"detail": "no such run"}, "no such run"),
        ({"detail": [{"loc": ["x"]}]}, "[{'loc': ['x']}]"),
        ({"error": "plain"}, "plain"),
        ({"error": {"message": "deep"}}, "deep"),
        ({"message": "flat"}, "flat"),
        (["odd"], "['odd']"),
        ("<html>no</html>", "a web page came with status 422: does the URL lead to the server? '<html>no</html>'"),
        ("", "the server answered with status 422"),
        ("x" * 400, "x" * 300 + "..."),
    ],
)
async def test_foreign_error_bodies_are_survived(server: ScriptedServer, toy: Toy, body: object, message: str) -> None:
    """Whatever a server or proxy puts into an error, its text reaches the caller in the right class."""
    server.faults["forward_backward"].append(faults.status(422, body))
    with pytest.raises(errors.InvalidRequestError) as caught:
        await toy.forward_backward([1])
    assert caught.value.message == message


async def test_an_answer_that_is_not_json_is_a_typed_error(server: ScriptedServer, toy: Toy) -> None:
    """A proxy's page with status 200 is not taken for an acceptance."""
    server.faults["forward_backward"].append(faults.status(200, "<html>login</html>"))
    with pytest.raises(errors.ServerError, match="is not JSON: '<html>login</html>'"):
        await toy.forward_backward([1])


async def test_an_acceptance_without_a_ticket_is_a_typed_error(server: ScriptedServer, toy: Toy) -> None:
    """An id that is missing is said to be missing."""
    server.faults["forward_backward"].append(faults.status(202, {"status": "pending"}))
    with pytest.raises(errors.ServerError, match="without a future_id"):
        await toy.forward_backward([1])


async def test_an_unreachable_server_is_named() -> None:
    """After the retries the error says which address does not answer, and why."""
    toy = connect_here("http://127.0.0.1:9", policy=RetryPolicy(count=1, first_delay=0.01))
    with pytest.raises(errors.ServerUnreachableError, match=r"no answer from http://127\.0\.0\.1:9/healthz") as caught:
        await toy.health_async()
    assert caught.value.url == "http://127.0.0.1:9/healthz"
    assert caught.value.__cause__ is not None
    await toy.core.service.aclose()


async def test_the_endpoint_explains_a_broken_connection(server: ScriptedServer) -> None:
    """What is known of a dead server is raised instead of a retry."""

    class Dead(FixedEndpoint):
        async def explain(self, error: BaseException) -> errors.TGTinkerError | None:
            return errors.ServerRestartedError(f"it ended: {type(error).__name__}", exit_code=-9, log_tail="bye")

    server.faults["forward_backward"].append(faults.reset())
    toy = connect_here(server.url, endpoint=Dead(server.url))
    with pytest.raises(errors.ServerRestartedError) as caught:
        await toy.forward_backward([1])
    assert caught.value.exit_code == -9
    assert len(server.requests) == 1
    await toy.core.service.aclose()


async def test_requests_carry_key_and_headers(server: ScriptedServer, connection: Connection) -> None:
    """The API key goes as a bearer token, and a trailing slash of the address does no harm."""
    await connection.send(HEALTHY)
    assert server.headers[0]["Authorization"] == "Bearer key-1"
    assert server.headers[0]["X-Mine"] == "1"
    assert server.requests == [("GET", "/healthz")]


async def test_a_whole_url_is_taken_as_it_is(server: ScriptedServer, connection: Connection) -> None:
    """A path may name another server, as the control plane's answers do."""
    reply = await connection.send(Request(method="GET", path=f"{server.url}/healthz?x=1"))
    assert reply.json() == {"status": "ok"}


async def test_a_server_that_says_nothing_counts_as_lost(server: ScriptedServer, connection: Connection) -> None:
    """Silence longer than the request's timeout is a broken connection."""
    server.faults["healthz"].extend([faults.late(30)] * 9)
    with pytest.raises(errors.ServerUnreachableError):
        await connection.send(Request(method="GET", path="/healthz", timeout=0.05))


async def test_another_loop_is_refused_by_name(connection: Connection) -> None:
    """A session belongs to one loop; the message names both."""
    await connection.send(HEALTHY)

    def elsewhere() -> str:
        with pytest.raises(errors.TGTinkerError) as caught:
            asyncio.run(connection.send(HEALTHY))
        assert caught.value.code == "WRONG_LOOP"
        return caught.value.message

    message = await asyncio.to_thread(elsewhere)
    assert repr(asyncio.get_running_loop()) in message
    assert message.count("EventLoop") == 2


async def test_a_closed_connection_refuses(connection: Connection) -> None:
    """After close every request is a ClientClosedError; closing again does nothing."""
    await connection.send(HEALTHY)
    assert connection.is_open()
    await connection.aclose()
    await connection.aclose()
    with pytest.raises(errors.ClientClosedError):
        await connection.send(HEALTHY)


async def test_a_request_in_flight_at_close_says_so(server: ScriptedServer, connection: Connection) -> None:
    """Closing ends a waiting request with ClientClosedError, not with a socket's words."""
    server.faults["healthz"].append(faults.until(asyncio.Event()))
    waiting = asyncio.create_task(connection.send(HEALTHY))
    while not server.requests:
        await asyncio.sleep(0.01)
    await connection.aclose()
    with pytest.raises(errors.ClientClosedError):
        await waiting


async def test_a_request_that_opens_the_session_at_close_says_so(
    server: ScriptedServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that comes up after the close is closed again, and nothing is sent through it."""
    gate, new_session = asyncio.Event(), transport._new_session

    async def late(*, verify_ssl: bool) -> aiohttp.ClientSession:
        await gate.wait()
        return await new_session(verify_ssl=verify_ssl)

    monkeypatch.setattr(transport, "_new_session", late)
    waiting = [asyncio.create_task(connection.send(HEALTHY)) for _ in range(2)]
    await asyncio.sleep(0)
    await connection.aclose()
    gate.set()
    for request in waiting:
        with pytest.raises(errors.ClientClosedError):
            await request
    assert not connection.is_open()
    assert server.requests == []


async def test_a_request_that_waits_for_its_turn_at_close_says_so(connection: Connection) -> None:
    """More requests than may be on their way at once: those that are still waiting are not sent after the close."""
    await connection.send(HEALTHY)
    waiting = [asyncio.create_task(connection.send(HEALTHY)) for _ in range(300)]
    await asyncio.sleep(0)
    await connection.aclose()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(one) for one in outcomes} <= {Reply, errors.ClientClosedError}
    assert errors.ClientClosedError in {type(one) for one in outcomes}


async def test_a_server_that_ends_with_its_client_is_no_riddle(connection: Connection) -> None:
    """Who closes a client while its server starts is told of the close, not of the end of that server."""

    class Starting(FixedEndpoint):
        async def resolve(self) -> tuple[str, str | None]:
            connection.closed = True  # the close ends the server that is being started
            raise errors.ServerUnreachableError("the server ended with exit code -15")

    connection.endpoint = Starting("http://nowhere", None)
    with pytest.raises(errors.ClientClosedError):
        await connection.send(HEALTHY)


@pytest.mark.parametrize("verify", [True, False])
async def test_certificates_are_checked_unless_told_otherwise(server: ScriptedServer, *, verify: bool) -> None:
    """The choice reaches the connector."""
    connection = Connection(FixedEndpoint(server.url), LoopHome(), verify_ssl=verify)
    await connection.send(HEALTHY)
    assert connection._session is not None
    assert connection._session.connector._ssl is verify  # type: ignore[union-attr]
    await connection.aclose()


async def test_an_abandoned_connection_opens_another_session(connection: Connection) -> None:
    """As after a fork: the old session is neither used nor closed."""
    connection.abandon()
    await connection.send(HEALTHY)
    inherited = connection._session
    assert inherited is not None
    connector = inherited.connector
    connection.abandon()
    assert connection._parents == [connector]
    await connection.send(HEALTHY)
    assert connection._session is not inherited
    assert connector is not None
    assert not connector.closed
    await connector.close()


async def test_concurrent_first_requests_share_one_session(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is made once, whoever comes first."""
    made, new_session = list[aiohttp.ClientSession](), transport._new_session

    async def counted(*, verify_ssl: bool) -> aiohttp.ClientSession:
        made.append(await new_session(verify_ssl=verify_ssl))
        return made[-1]

    monkeypatch.setattr(transport, "_new_session", counted)
    replies = await asyncio.gather(*(connection.send(HEALTHY) for _ in range(20)))
    assert {reply.status for reply in replies} == {200}
    assert len(made) == 1


async def test_a_large_body_arrives_whole(server: ScriptedServer, toy: Toy) -> None:
    """Megabytes go out in pieces and come in complete, also when tried again."""
    server.faults["forward_backward"].append(faults.status(503))
    await toy.forward_backward(list(range(300_000)))
    assert server.accepted("forward_backward")[0].body["batch"] == list(range(300_000))


def test_the_connection_limit_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the files a process may open, within reason; platforms without such a limit take the most."""
    import resource

    for soft, limit in ((1024, 512), (64, 64), (10**6, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert transport._connection_limit() == limit
    monkeypatch.setitem(sys.modules, "resource", None)
    assert transport._connection_limit() == 4096


def test_retry_after_may_be_a_date() -> None:
    """Seconds, a date, or nonsense: the first two count."""
    soon = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    waits = [Reply(429, {"Retry-After": value}, b"").retry_after() for value in ("1.5", "-3", soon, "soon", "30 Foo")]
    assert waits[:2] == [1.5, 0.0]
    assert waits[2] is not None
    assert 3000 < waits[2] <= 3600
    assert waits[3:] == [None, None]


def test_delays_grow_and_stay_below_the_ceiling() -> None:
    """Exponential backoff, with up to half of it random."""
    policy = RetryPolicy(first_delay=1.0, longest_delay=8.0)
    for attempt, ceiling in enumerate([1.0, 2.0, 4.0, 8.0, 8.0], start=1):
        assert all(ceiling / 2 <= policy.delay(attempt, None) <= ceiling for _ in range(20))
    assert policy.delay(1, 7.0) == 7.0


def test_a_call_is_a_value_that_can_be_looked_at() -> None:
    """What will be sent is known without a network: path, body, key, and the user's line."""
    made = call(FORWARD_BACKWARD, {"batch": [1]}, base=TG, sequenced=True)
    assert made.path == "/v1/training_clients/run-1/forward_backward"
    assert made.body == b'{"batch":[1]}'
    assert made.numbered(7) == b'{"batch":[1],"seq_id":7}'
    assert made.site.startswith("test_transport.py:")
    assert made.key != call(FORWARD_BACKWARD, {}, base=TG).key
    assert call(FORWARD_BACKWARD, {}, sequenced=True).numbered(1) == b'{"seq_id":1}'
    assert call(HEALTH, query={"a": None}).path == "/healthz"
    assert call(HEALTH, query={"a": "x y", "b": 2}).path == "/healthz?a=x+y&b=2"
    assert "batch" not in repr(made)
