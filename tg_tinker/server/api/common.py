"""What the handlers of every wire share: reading bodies, submitting operations, answering."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.server.creation import Creation
from tg_tinker.server.middleware import REQUEST_ID, ROOMS, TENANT
from tg_tinker.server.records.tickets import Held, Ticket
from tg_tinker.server.rooms import Rooms
from tg_tinker.server.training.runs import Run, Surface
from tg_tinker.store.names import check_label
from tg_tinker.types import arguments, checks
from tg_tinker.types.arguments import MOST_SECONDS
from tg_tinker.wire import codec, headers

T = TypeVar("T")

CREATION: web.AppKey[Creation] = web.AppKey("creation", Creation)
LONG_BODY = 64 * 1024  # bytes; a longer one is decoded in a thread, so that nobody else waits for it
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
        kind = "training_client" if surface == "tg" else "run"
        raise ResourceNotFoundError(f"no such {kind.replace('_', ' ')}", resource_type=kind, resource_id=run_id)
    return run


async def read(request: web.Request, cls: type[T]) -> T:
    """The body as a checked value; raises ``InvalidRequestError`` with every fault."""
    return await _parsed(request, lambda body: codec.decode(cls, codec.loads(body or b"{}")))


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body as plain data, for wires that ignore what they do not know."""
    data = await _parsed(request, lambda body: codec.loads(body or b"{}"))
    if not isinstance(data, dict):
        raise checks.refuse("body", "a JSON object", data)
    return data


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
    if key is not None and not 1 <= len(key) <= LONGEST_KEY:
        raise checks.refuse(headers.IDEMPOTENCY_KEY, f"1 to {LONGEST_KEY} characters", key)
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
    return min(number(request, "wait", hold), max(hold, MAX_WAIT))


def number(request: web.Request, name: str, default: float) -> float:
    """A number of the query string, of at least 0."""
    text = request.query.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e9:
        raise checks.refuse(name, "a number of at least 0", text)
    return value


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
        raise ResourceNotFoundError("no such future", resource_type="future", resource_id=future_id)
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
    body = await request.read()
    return parse(body) if len(body) <= LONG_BODY else await asyncio.to_thread(parse, body)
