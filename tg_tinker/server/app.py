"""The aiohttp application: middlewares, routes, start and end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import attrs
from aiohttp import web

from tg_tinker.server.api import (
    futures,
    loops,
    loops_checkpoints,
    loops_control,
    public,
    records,
    samplers,
    tg,
)
from tg_tinker.server.api.common import CREATION
from tg_tinker.server.creation import Creation
from tg_tinker.server.engine import Engine
from tg_tinker.server.middleware import ROOMS, add_headers, authenticate, check_host, finish, identify
from tg_tinker.server.rooms import Rooms
from tg_tinker.server.settings import Settings
from tg_tinker.server.sweeping import Sweeping


def create_app(
    settings: Settings, *, engine: Engine | None = None, report: Callable[[str], Any] | None = None
) -> web.Application:
    """Make the application; serve it with ``handler_cancellation=True``, so that clients who leave are noticed.

    ``engine`` replaces the real one in tests. ``report`` hears which stage the loading of a model is at.
    """
    app = web.Application(
        middlewares=[identify, check_host, authenticate, finish], client_max_size=settings.max_body_bytes
    )

    async def parts(app: web.Application) -> AsyncIterator[None]:
        rooms = await Rooms.open(settings, engine, report or _nobody)
        sweeping = Sweeping(rooms)
        sweeping.start()
        app[ROOMS], app[CREATION] = rooms, Creation(rooms)
        yield
        try:
            await sweeping.aclose()
        finally:
            await rooms.aclose()

    async def stop(app: web.Application) -> None:
        app[ROOMS].stop()

    app.cleanup_ctx.append(parts)
    app.on_shutdown.append(stop)
    app.on_response_prepare.append(add_headers)
    for wire in (public, tg, futures, records):
        app.add_routes([*wire.routes(), *_below_api(wire.routes())])
    for wire in (loops, samplers, loops_control, loops_checkpoints):
        app.add_routes(wire.routes())
    return app


def _below_api(routes: Iterable[web.RouteDef]) -> list[web.RouteDef]:
    """The TG wire once more, where the published server has it: under ``/api/v1``."""
    return [attrs.evolve(route, path=f"/api{route.path}") for route in routes if route.path.startswith("/v1/")]


def _nobody(_: str) -> None:
    pass
