"""``/v1/futures``: what became of accepted operations, on the TG wire."""

from __future__ import annotations

from typing import get_args

import attrs
from aiohttp import web

from tg_tinker.server.api import common, query
from tg_tinker.server.records.tickets import Held, Ticket
from tg_tinker.wire import codec, tg

STATUSES: tuple[str, ...] = get_args(tg.Status)


def routes() -> list[web.RouteDef]:
    """Every route of this file."""
    return [
        web.get(tg.FUTURES.path, list_futures),
        web.get(tg.FUTURE.path, get_future),
        web.get(tg.FUTURE_RESULT.path, result),
        web.post(tg.FUTURE_CANCEL.path, cancel),
    ]


async def list_futures(request: web.Request) -> web.Response:
    """The tenant's futures, newest first, of earlier server processes too."""
    query.only(request, "training_client_id", "status", "limit")
    listed = await common.rooms_of(request).journal.list(
        common.tenant_of(request),
        run_id=request.query.get("training_client_id"),
        status=query.choice(request, "status", STATUSES),
        limit=query.limit(request),
    )
    return common.reply(listed)


async def get_future(request: web.Request) -> web.Response:
    """How far it is."""
    return common.reply((await _held(request)).info())


async def result(request: web.Request) -> web.Response:
    """The outcome, as soon as it is there; the request is held until then, at most as long as ``wait`` says."""
    held = await _held(request)
    done = await common.ended(request, held, common.seconds_to_hold(request))
    told = tg.FutureResult(future_id=held.info().future_id, status=held.info().status)
    if done:
        error = held.error()
        if error is None:
            told = attrs.evolve(told, result=codec.embedded(await held.body()))
        else:
            held.tell_failure()
            told = attrs.evolve(told, error=error.to_wire()["error"])
    return common.reply(told)


async def cancel(request: web.Request) -> web.Response:
    """Keep it from running, or stop it; say whether that came in time."""
    held = await _held(request)
    cancelled = isinstance(held, Ticket) and await common.rooms_of(request).tickets.cancel(held)
    await common.ended(request, held, 0)
    return common.reply(tg.CancelResult(success=cancelled))


async def _held(request: web.Request) -> Held:
    return await common.held(request, request.match_info["id"])
