"""Token streams: what the device thread says, as frames to one client; a client that leaves stops the generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from tg_tinker.server.api import common
from tg_tinker.server.middleware import ROOMS
from tg_tinker.server.records.tickets import Ticket
from tg_tinker.server.work.scheduler import tell
from tg_tinker.types.results import SampleResult, StreamChunk
from tg_tinker.wire import frames


class TokenStream:
    """Chunks of one request, from the device thread to the loop that made this."""

    def __init__(self, completions: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[StreamChunk | None] = asyncio.Queue()
        self._sent = [0] * completions  # characters
        self.result: SampleResult | None = None

    def on_token(self, index: int, token: int, logprob: float, text: str) -> None:
        """Pass a token on; from the device thread."""
        del logprob
        tell(self._loop, self._chunks.put_nowait, StreamChunk(text=text, index=index, token_ids=(token,)))

    def end(self, result: SampleResult | None) -> None:
        """Nothing more will come."""
        self.result = result
        self._chunks.put_nowait(None)

    async def pieces(self) -> AsyncIterator[list[StreamChunk]]:
        """The chunks as they come, all that are there at a time."""
        more = True
        while more:
            waiting = [await self._chunks.get()]
            while not self._chunks.empty():
                waiting.append(self._chunks.get_nowait())
            more = None not in waiting
            chunks = [chunk for chunk in waiting if chunk is not None]
            for chunk in chunks:
                self._sent[chunk.index] += len(chunk.text)
            yield chunks

    def last(self) -> list[StreamChunk]:
        """What is left of each text, and why it ended."""
        samples = () if self.result is None else self.result.samples
        return [
            StreamChunk(text=sample.completion[sent:], index=index, finish_reason=sample.finish_reason)
            for index, (sample, sent) in enumerate(zip(samples, self._sent, strict=True))
        ]


async def respond(request: web.Request, ticket: Ticket, stream: TokenStream) -> web.StreamResponse:
    """Send the stream of a ticket; the ticket is cancelled when the client goes away."""
    tickets = request.app[ROOMS].tickets
    ticket.when_done(stream.end)
    response = web.StreamResponse(headers={"Content-Type": frames.CONTENT_TYPE, "Cache-Control": "no-store"})
    try:
        await response.prepare(request)
        async for chunks in stream.pieces():
            if chunks:
                await response.write(b"".join(frames.pack({"item": chunk}) for chunk in chunks))
        await common.ended(request, ticket, None)
        await response.write(_ending(ticket, stream))
    except ConnectionError:
        pass  # the client has gone; nobody is left to tell
    finally:
        if not ticket.done:
            tickets.stop(ticket)
    return response


def _ending(ticket: Ticket, stream: TokenStream) -> bytes:
    error = ticket.error()
    if error is not None:
        return frames.pack(error.to_wire())
    return b"".join(frames.pack({"item": chunk}) for chunk in stream.last()) + frames.pack(frames.END)
