"""Streams: chunks as they come, bounded, ordered, and ended from either side."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from fixtures import faults
from fixtures.client import Numbered, Toy
from fixtures.server import ScriptedServer

from tg_tinker import errors
from tg_tinker.threads.channel import Channel, drop
from tg_tinker.wire import frames


async def test_all_chunks_arrive_in_order(server: ScriptedServer, either: Toy) -> None:
    """A stream that is read to its end gives everything the server sent."""
    server.chunks = 30
    assert [chunk.number async for chunk in either.sample_stream_async("x")] == list(range(30))


async def test_breaking_off_closes_the_source(server: ScriptedServer, toy: Toy) -> None:
    """After a break at the third chunk the server sees the disconnect and stops generating."""
    async for chunk in toy.sample_stream_async("x"):
        if chunk.number == 3:
            break
    gc.collect()
    await gone(server)


async def test_aclose_ends_the_stream(server: ScriptedServer, toy: Toy) -> None:
    """An iterator can be closed by hand, before its first chunk too."""
    chunks = toy.sample_stream_async("x")
    while server.chunks_sent < 1:
        await asyncio.sleep(0.01)
    await chunks.aclose()  # type: ignore[attr-defined]
    await gone(server)


async def test_a_stream_that_is_never_read_is_closed(server: ScriptedServer, toy: Toy) -> None:
    """Dropping the iterator is enough, also before the request is on its way."""
    toy.sample_stream_async("x")
    gc.collect()
    await toy.forward_backward([1])
    assert server.order() == ["forward_backward"]


async def test_the_hand_over_is_bounded(server: ScriptedServer, toy: Toy) -> None:
    """A consumer that does not read holds eight chunks, not a thousand."""
    server.chunks = 60
    chunks = toy.sample_stream_async("x")
    while server.chunks_sent < 60:
        await asyncio.sleep(0.01)
    assert repr(chunks._channel) == "<Channel 8/8>"  # type: ignore[attr-defined]
    assert [chunk.number async for chunk in chunks] == list(range(60))
    assert repr(chunks._channel) == "<Channel 0/8 closed>"  # type: ignore[attr-defined]


async def test_a_stream_takes_its_place_in_the_order(server: ScriptedServer, toy: Toy) -> None:
    """What was submitted before is accepted before; what comes after need not wait for the end."""
    server.faults["forward_backward"].append(faults.late(0.05))
    backward = toy.forward_backward([1])
    chunks = toy.sample_stream_async("x")
    step = toy.optim_step()
    await step
    paths = [path.rsplit("/", 1)[-1] for method, path in server.requests if method == "POST"]
    assert paths == ["forward_backward", "sample_stream", "optim_step"]
    await backward
    drop(chunks._channel)  # type: ignore[attr-defined]
    await gone(server)


async def test_a_refused_stream_raises_its_error(server: ScriptedServer, toy: Toy) -> None:
    """The refusal comes with the first chunk, typed and with a note; transient ones are tried again."""
    server.faults["sample_stream"].extend([faults.reset(), faults.status(503), faults.status(422)])
    with pytest.raises(errors.InvalidRequestError) as caught:
        await anext(toy.sample_stream_async("x"))
    assert caught.value.__notes__[0].startswith("sample_stream #1 on run r-1, submitted at")
    await toy.forward_backward([1])


async def test_an_unreachable_server_ends_the_stream(server: ScriptedServer, toy: Toy) -> None:
    """When the retries are used up, the iterator says so."""
    server.faults["sample_stream"].extend([faults.reset()] * 9)
    with pytest.raises(errors.ServerUnreachableError):
        await anext(toy.sample_stream_async("x"))


def sending(*pieces: bytes) -> faults.Fault:
    """Answer with these bytes and then close the response properly."""

    async def fault(request: web.Request, _: faults.Proceed) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    return fault


async def read(chunks: AsyncIterator[Numbered]) -> list[int]:
    """The numbers of what arrives."""
    return [chunk.number async for chunk in chunks]


async def test_an_error_in_the_middle_comes_after_the_chunks(server: ScriptedServer, toy: Toy) -> None:
    """What was generated is handed over before the failure."""
    error = {"error": {"code": "INTERNAL_ERROR", "message": "lost the device", "details": {}}}
    server.faults["sample_stream"].append(sending(frames.pack({"item": {"number": 0}}), frames.pack(error)))
    chunks = toy.sample_stream_async("x")
    assert (await anext(chunks)).number == 0
    with pytest.raises(errors.ServerError, match="lost the device"):
        await anext(chunks)


async def test_a_plain_error_frame_is_survived(server: ScriptedServer, toy: Toy) -> None:
    """A server may send its error as text."""
    server.faults["sample_stream"].append(sending(frames.pack({"error": "odd"})))
    with pytest.raises(errors.ServerError, match="odd"):
        await read(toy.sample_stream_async("x"))


async def test_a_break_is_never_taken_for_the_end(server: ScriptedServer, toy: Toy) -> None:
    """A stream without its end frame is an error, however neatly the connection closed."""
    server.faults["sample_stream"].append(sending(frames.pack({"item": {"number": 0}})))
    with pytest.raises(errors.ServerUnreachableError, match="broke off before its end"):
        await read(toy.sample_stream_async("x"))


async def test_closing_the_client_ends_its_streams(server: ScriptedServer, toy: Toy) -> None:
    """An open iterator learns that the client was closed."""
    chunks = toy.sample_stream_async("x")
    await anext(chunks)
    await toy.aclose()
    with pytest.raises(errors.ClientClosedError, match="closed during a stream"):
        await read(chunks)


async def test_nothing_comes_after_leaving(server: ScriptedServer, toy: Toy) -> None:
    """An iterator that its reader closed is at its end, and not in error."""
    chunks = toy.sample_stream_async("x")
    await anext(chunks)
    await chunks.aclose()  # type: ignore[attr-defined]
    assert [chunk async for chunk in chunks] == []


async def test_leaving_before_the_producer_is_known() -> None:
    """A consumer may be gone before the source says how to stop it."""
    stopped: list[bool] = []
    channel: Channel[int] = Channel(lambda function, *args: function(*args))
    channel.leave()
    channel.on_leave(lambda: stopped.append(True))
    assert stopped == [True]


async def gone(server: ScriptedServer) -> None:
    """Wait until the server has seen the client go."""
    while not server.disconnects:
        await asyncio.sleep(0.01)
