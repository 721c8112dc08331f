"""Connections, and listening for them. What aiohttp refuses before there is a request is answered in the wire's words.

It takes one line of the log, which does not repeat what was sent: there may be a key in it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

from tg_tinker.errors import InvalidRequestError
from tg_tinker.server.middleware import REQUEST_ID, error_response, give_id, http_error_response
from tg_tinker.wire import headers

_log = logging.getLogger("tg_tinker.server")
_BACKLOG = 128  # connections that wait to be accepted
_OPTIONS: dict[str, Any] = {"access_log": None}  # which is not typed to be none


async def listen(runner: web.AppRunner, host: str, port: int) -> asyncio.Server:
    """Accept connections to the application of ``runner``, which is set up already."""
    loop, manager = asyncio.get_running_loop(), runner.server
    if manager is None:
        raise RuntimeError("the runner is not set up")
    return await loop.create_server(lambda: Connection(manager, loop=loop, **_OPTIONS), host, port, backlog=_BACKLOG)


class Connection(web.RequestHandler):
    """One connection, and the answers that no middleware gets to see."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Take bytes. For a URL that is none aiohttp has no answer; it lets yarl's error through."""
        try:
            super().data_received(data)
        except ValueError as error:
            _log.warning("a request that is no HTTP: %s", type(error).__name__)
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what cannot be parsed as HTTP, and hang up."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        what = exc.message.partition(":")[0]  # what was sent comes behind it
        error = InvalidRequestError(f"expected HTTP/1.1: {what}", constraint="HTTP/1.1", code=f"HTTP_{status}")
        give_id(request)
        _log.warning("%s sent what is no HTTP: %s [%s]", request.remote, type(exc).__name__, request[REQUEST_ID])
        response = error_response(request, error, status)
        response.headers[headers.REQUEST_ID] = request[REQUEST_ID]
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; what still is an exception here is about an ``Expect`` that aiohttp does not know."""
        if isinstance(resp, web.HTTPException) and isinstance(request, web.Request):
            give_id(request)
            resp = http_error_response(request, resp)
        return await super().finish_response(request, resp, start_time)
