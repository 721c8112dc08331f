"""What happens to every request: an id, a checked Host, a tenant; and to every error: the one wire body."""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from tg_tinker.errors import (
    AuthenticationError,
    AuthorizationError,
    InvalidRequestError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.server.auth import PUBLIC, SIGNED
from tg_tinker.server.rooms import Rooms
from tg_tinker.server.tasks import whole
from tg_tinker.types import checks
from tg_tinker.wire import codec, headers

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ROOMS: web.AppKey[Rooms] = web.AppKey("rooms", Rooms)
_key: Callable[[str, type], Any] = getattr(web, "RequestKey", lambda name, _: name)  # aiohttp has it since 3.14
REQUEST_ID = _key("tg_tinker.request_id", str)
TENANT = _key("tg_tinker.tenant", str)

_log = logging.getLogger("tg_tinker.server")
#: what belongs to a tenant
_OWNED = frozenset({"training_client", "run", "future", "operation", "artifact", "checkpoint", "sampler"})
_END_WITH_THEIR_CLIENT = ("/sample", "/sample_stream", "/result", "/operations/{id}", "/trainers_policy_version")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
#: statuses that a Loops client takes for "try again for an hour" when a submit answers with them
_RETRIED_BY_LOOPS = frozenset({400, 404, 408, 502, 503})


@web.middleware
async def identify(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id (its own, if it is well formed) and turn whatever is raised into a response."""
    give_id(request)
    response = await _answered(request, handler)
    refused = response.status >= 400 and response.status != 408  # that is Loops for "not yet"
    told = request.method, _shown(request), request[REQUEST_ID], request.get(TENANT, "nobody"), response.status
    _log.log(logging.INFO if refused else logging.DEBUG, "%s %s [%s] of %s: %d", *told)
    return response


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except TGTinkerError as error:
        return error_response(request, await _on_record(request, error))
    except web.HTTPException as error:
        return http_error_response(request, error)
    # The last line of defence: whatever it is goes to the log, and none of it to the client.
    except Exception:  # noqa: BLE001
        _log.exception("%s %s [%s] failed", request.method, _shown(request), request[REQUEST_ID])
        return error_response(request, ServerError("the server failed; its log says why"))


@web.middleware
async def check_host(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep web pages out: they cannot rebind their own name to us, nor post to us from elsewhere."""
    settings = request.app[ROOMS].settings
    names = _LOCAL_NAMES | {settings.host} | set(settings.allowed_hosts)
    # Browsers always send a Host; for who does not, aiohttp would ask the DNS who we are, and everybody would wait.
    if settings.loopback and "Host" in request.headers and _hostname(f"//{request.host}") not in names:
        raise AuthorizationError("the Host header names another machine; this server serves its own machine only")
    origin = request.headers.get("Origin")
    if await _embedded(request) if origin is None else _hostname(origin) not in names:
        raise AuthorizationError("the request comes from another site; web pages elsewhere may not use this server")
    return await handler(request)


async def _embedded(request: web.Request) -> bool:
    """Whether a page of another site embeds or links to this: it has no Origin, and could have a model loaded.

    Only where no key is asked for; a page that embeds something cannot send one.
    """
    cross_site = request.headers.get("Sec-Fetch-Site") == "cross-site"
    return cross_site and not await request.app[ROOMS].keys.required()


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Find the tenant of every request that is not for a public route."""
    resource = request.match_info.route.resource
    if resource is None or resource.canonical not in PUBLIC:
        rooms = request.app[ROOMS]
        try:
            request[TENANT] = await whole(rooms.keys.tenant_of(request.headers.get("Authorization")))
        except AuthenticationError:
            await whole(_note_lapsed_key(request))
            raise
        rooms.rate_limit.take(request[TENANT])
        await whole(rooms.auditing.find_head(request[TENANT]))
    return await handler(request)


@web.middleware
async def finish(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let a handler come to its end although its client has gone, but for those that only wait or sample."""
    resource = request.match_info.route.resource
    if resource is not None and resource.canonical.endswith(_END_WITH_THEIR_CLIENT):
        return await handler(request)
    return await whole(_await(handler, request))


def give_id(request: web.BaseRequest) -> None:
    """Give the request an id: its own, if it is well formed."""
    given = request.headers.get(headers.REQUEST_ID, "")
    request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def event_id(request: web.Request) -> str:
    """Name one event of the audit log; the client chooses the request's id, and an id that is known is not logged."""
    return f"{request[REQUEST_ID]}/{secrets.token_hex(4)}"


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """On every response: the request's id, what this server offers beyond the published wires, tenant, newest head."""
    response.headers[headers.REQUEST_ID] = request.get(REQUEST_ID, "")
    response.headers[headers.EXTENSIONS] = ",".join(headers.OFFERED)
    if TENANT not in request:
        return
    response.headers[headers.TENANT] = request[TENANT]
    head = request.app[ROOMS].auditing.head(request[TENANT])
    if head is not None:
        response.headers[headers.AUDIT_HEAD] = head


def error_response(
    request: web.BaseRequest, error: TGTinkerError, status: int | None = None, *, exact_status: bool = False
) -> web.Response:
    """The wire body of an error, with its status."""
    error.request_id = request.get(REQUEST_ID)
    status = status or error.http_status
    if (
        not exact_status
        and request.method == "POST"
        and request.path.startswith("/loops/")
        and status in _RETRIED_BY_LOOPS
    ):
        status = 429 if error.details.get("retry_after") else 422
    response = web.Response(status=status, body=codec.dumps(error.to_wire()), content_type="application/json")
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.details.get("retry_after"):
        response.headers[headers.RETRY_AFTER] = str(math.ceil(error.details["retry_after"]))
    return response


def http_error_response(request: web.Request, error: web.HTTPException) -> web.Response:
    """The same of what aiohttp refuses: no such route, another method, a body that is too large, an ``Expect``."""
    response = error_response(request, _typed(request, error), error.status)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


async def _on_record(request: web.Request, error: TGTinkerError) -> TGTinkerError:
    """Leave a trace of who asked for what is not theirs; what does not exist looks the same, here as well.

    Returns what to answer: the error, or that it could not be recorded.
    """
    refused = isinstance(error, AuthorizationError) or error.details.get("resource_type") in _OWNED
    if refused and TENANT in request:
        try:
            await request.app[ROOMS].auditing.happened(request[TENANT], "denied", event_id(request), error)
        except ServerError as unrecorded:
            return unrecorded
    return error


async def _note_lapsed_key(request: web.Request) -> None:
    """Leave a trace in the log of whose key it was. Raises ``ServerError`` if that takes too long."""
    rooms = request.app[ROOMS]
    key = await rooms.keys.lapsed(request.headers.get("Authorization"))
    if key is not None:
        error = AuthenticationError(f"the API key {key.key_id} was used, which is revoked or has expired")
        await rooms.auditing.happened(key.tenant_id, "denied", event_id(request), error)


async def _await(handler: Handler, request: web.Request) -> web.StreamResponse:
    return await handler(request)


def _typed(request: web.Request, error: web.HTTPException) -> TGTinkerError:
    if error.status == 404:
        message = f"no such route: {checks.shown(request.path)}"
        return ResourceNotFoundError(message, resource_type="route", resource_id=request.path)
    if error.status == 413:
        wanted = f"at most {request.app[ROOMS].settings.max_body_bytes} bytes"
        return InvalidRequestError(f"body: expected {wanted}", field="body", constraint=wanted)
    field, wanted = None, error.reason
    if isinstance(error, web.HTTPMethodNotAllowed):
        field, wanted = "method", " or ".join(sorted(error.allowed_methods))
    elif isinstance(error, web.HTTPExpectationFailed):
        field, wanted = "Expect", "100-continue"
    return InvalidRequestError(
        f"{field or 'the request'}: expected {wanted}", field=field, constraint=wanted, code=f"HTTP_{error.status}"
    )


def _shown(request: web.Request) -> str:
    """The path as it was sent, but for signed URLs, which open to whoever knows them."""
    return SIGNED if request.path.startswith(SIGNED.partition("{")[0]) else request.rel_url.raw_path


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
