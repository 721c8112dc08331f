"""What the handlers of every wire share: reading bodies, submitting operations, answering."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.server.api import query
from tg_tinker.server.creation import Creation
from tg_tinker.server.middleware import REQUEST_ID, ROOMS, TENANT
from tg_tinker.server.records.tickets import Held, Ticket
from tg_tinker.server.rooms import Rooms
from tg_tinker.server.training.runs import Run, Surface
from tg_tinker.store.names import check_label
from tg_tinker.types import arguments, checks
from tg_tinker.types.arguments import MOST_SECONDS
from tg_tinker.wire import codec, headers, names

T = TypeVar("T")

CREATION: web.AppKey[Creation] = web.AppKey("creation", Creation)
LONG_BODY = 64 * 1024  # bytes; a longer one is decoded in a thread, so that nobody else waits for it
SLOWEST_BODY = 600.0  # seconds; a client that sends on for longer waits for nothing, or means no good
LONGEST_KEY = 128
_OURS = "tg-tinker/"
MAX_WAIT = 60.0  # seconds that one poll may be held


def rooms_of(request: web.Request) -> Rooms:
    """The server's parts."""
    return request.app[ROOMS]


def creation_of(request: web.Request) -> Creation:
    """What makes runs, and ends them."""
    return request.app[CREATION]


def tenant_of(request: web.Request) -> str:
    """Who asks."""
    tenant: str = request[TENANT]
    return tenant


async def run_of(request: web.Request, run_id: str, surface: Surface | None = None) -> Run:
    """The tenant's run.

    Raises ``ResourceNotFoundError``, or ``ServerRestartedError`` for one that ended with its server.
    """
    rooms, tenant = rooms_of(request), tenant_of(request)
    run = rooms.runs.find(tenant, run_id, surface)
    if run is None:
        await rooms.registry.explain(tenant, run_id)
        loops = surface == "loops" or (surface is None and run_id.startswith("run-"))
        kind = "run" if loops else "training_client"
        message = f"no such {kind.replace('_', ' ')}: {checks.shown(run_id)}"
        raise ResourceNotFoundError(message, resource_type=kind, resource_id=run_id)
    return run


async def read(request: web.Request, cls: type[T], *, exact: bool = False) -> T:
    """The body as a checked value; raises ``InvalidRequestError`` with every fault.

    ``exact``, as on the TG wire: a key that ``cls`` does not know is a fault too, and so is one that comes twice;
    others ignore the one, and take the last of the other.
    """

    def decode(fields: dict[str, Any]) -> T:
        if exact:
            checks.refuse_unknown(cls, fields)
        return codec.decode(cls, fields)

    return await read_as(request, decode, exact=exact)


async def read_as(request: web.Request, decode: Callable[[dict[str, Any]], T], *, exact: bool = False) -> T:
    """What ``decode`` makes of the body, which must be a JSON object; it may run in a thread.

    ``exact``: a key that comes twice is refused.
    """

    def parse(body: bytes) -> T:
        fields = codec.loads(body or b"{}")
        if exact:
            names.refuse_repeated(body, fields)
        if not isinstance(fields, dict):
            raise checks.refuse("body", "a JSON object", fields)
        return decode(fields)

    return await _parsed(request, parse)


async def submit(
    request: web.Request, run: Run, operation: str, begin: Callable[[Ticket], Any], *, keyed: bool = True
) -> Ticket:
    """Take an operation into its run's order, or find the one that an earlier try of this request began."""
    key = idempotency_key(request) if keyed else None
    route = f"{request.method} {request.path}"
    ticket = Ticket(
        tenant=run.tenant,
        run_id=run.id,
        operation=operation,
        key=key,
        digest=await _parsed(request, lambda body: rooms_of(request).auditing.digest(route, body)),
        request_id=request[REQUEST_ID],
    )
    return rooms_of(request).tickets.accept(ticket, run.lane, partial(begin, ticket))


def idempotency_key(request: web.Request) -> str | None:
    """The request's idempotency key, if it has one."""
    key = request.headers.get(headers.IDEMPOTENCY_KEY)
    if key is not None and not (1 <= len(key) <= LONGEST_KEY and key.isprintable()):
        raise checks.refuse(headers.IDEMPOTENCY_KEY, f"1 to {LONGEST_KEY} printable characters", key)
    return key


def reply(value: object, status: int = 200, extra: Mapping[str, str] | None = None) -> web.Response:
    """A JSON answer."""
    return web.Response(status=status, body=codec.dumps(value), content_type="application/json", headers=extra)


def own_url(request: web.Request, path: str) -> str:
    """Our own client is told the path, which is right behind any proxy; others need the whole URL."""
    if request.headers.get("User-Agent", "").startswith(_OURS):
        return path
    return f"{request.scheme}://{request.host}{path}"


def seconds_to_hold(request: web.Request) -> float:
    """How long a poll may be held: what it asks for (``wait``), else the server's own limit."""
    hold = rooms_of(request).settings.hold
    return min(query.number(request, "wait", hold), max(hold, MAX_WAIT))


def check_name(name: str, ttl_seconds: int | None) -> None:
    """Refuse a checkpoint name that is no label, or a time to live that is over at once."""
    check_label(name, "name")
    if ttl_seconds is not None:
        arguments.whole("ttl_seconds", ttl_seconds, 1, MOST_SECONDS)


async def held(request: web.Request, future_id: str) -> Held:
    """A tenant's operation, in memory or in the database, by its id or its idempotency key.

    Raises ``ResourceNotFoundError``.
    """
    rooms, tenant = rooms_of(request), tenant_of(request)
    found: Held | None = rooms.tickets.find(tenant, future_id)
    if found is None or (isinstance(found, Ticket) and found.dropped):
        found = await rooms.journal.find(tenant, future_id)
    if found is None:
        message = f"no such future: {checks.shown(future_id)}"
        raise ResourceNotFoundError(message, resource_type="future", resource_id=future_id)
    return found


async def ended(request: web.Request, held: Held, seconds: float | None) -> bool:
    """Wait for the end, at most ``seconds``; whether it has come, and is on record as far as it must be to be told.

    Raises ``ServerError`` where the audit log cannot be written.
    """
    if not await held.wait(seconds):
        return False
    if isinstance(held, Ticket):
        await rooms_of(request).recording.before_telling(held)
    return True


async def _parsed(request: web.Request, parse: Callable[[bytes], T]) -> T:
    body = await _received(request)
    return parse(body) if len(body) <= LONG_BODY else await asyncio.to_thread(parse, body)


async def _received(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(SLOWEST_BODY):
            return await request.read()
    except TimeoutError as error:
        wanted = f"all of it within {SLOWEST_BODY:.0f} seconds"
        raise InvalidRequestError(f"body: expected {wanted}", field="body", constraint=wanted) from error
    except web.RequestPayloadError as error:
        wanted = "bytes in the encodings that the headers name, within the limit for bodies"
        raise InvalidRequestError(f"body: expected {wanted}", field="body", constraint=wanted) from error
