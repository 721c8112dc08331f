"""The operations of one run (or sampler, or service): started in order, waited for, streamed, cancelled, closed.

It joins lane, transport and retrieval; the faces publish what it does, and the wire tables say how it is spelt.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from tg_tinker.core.call import Call
from tg_tinker.core.lane import Lane, Place
from tg_tinker.core.operation import Operation
from tg_tinker.core.retrieval import Retrieval
from tg_tinker.core.retrieve import decoded, off_loop, read_direct
from tg_tinker.core.service import ServiceCore
from tg_tinker.core.transport import Request
from tg_tinker.errors import ClientClosedError, ServerUnreachableError, TGTinkerError
from tg_tinker.failure import Failure
from tg_tinker.futures import OperationFuture
from tg_tinker.threads.channel import Channel
from tg_tinker.wire.errors import from_wire
from tg_tinker.wire.frames import FrameReader

__all__ = ["RunCore"]

R = TypeVar("R")
ABANDON_BUDGET = 0.8  # seconds that a direct call, interrupted, spends on asking the server to cancel
_logger = logging.getLogger("tg_tinker.core")
_REMEMBERED = 1000  # operations never waited for that are named at close


class RunCore:
    """What a client's faces call. ``start``, ``perform`` and ``stream`` may be called in any thread."""

    def __init__(
        self,
        service: ServiceCore,
        retrieval: Retrieval,
        *,
        name: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.service = service
        self.home = service.home
        self.retrieval = retrieval
        self.name = name
        self.headers = dict(headers or {})
        self.closed = False
        self.at_close: list[Callable[[], None]] = []  # run once, in a worker thread, when this client is closed
        self._begin_anew()
        service.runs.add(self)

    def __repr__(self) -> str:
        """Name what it serves."""
        return f"<RunCore {self.name or 'of the service'}{' closed' if self.closed else ''}>"

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self.lane = Lane()
        self.tasks: set[asyncio.Task[None]] = set()
        self.unwatched: dict[str, str] = {}
        self.orphans: list[OperationFuture[Any]] = []

    def check_open(self) -> None:
        """Raise ``ClientClosedError`` after close; in a forked child, leave the parent's queue to the parent."""
        self.service.check_open()
        if self.closed:
            raise ClientClosedError(f"this client{self._of()} is closed; make a new one")
        if os.getpid() != self._pid:
            self._begin_anew()

    def _of(self) -> str:
        return f" of {self.name}" if self.name else ""

    # ------------------------------------------------------------------------------- three ways to call

    def start(self, call: Call[R], place: Place | None = None) -> OperationFuture[R]:
        """Take the next place in the run's order, unless one was kept, and send the call in its turn; never waits."""
        return self._start(call, Operation(self), place)

    def _start(self, call: Call[R], operation: Operation[R], place: Place | None = None) -> OperationFuture[R]:
        self.check_open()
        place = place or self.lane.take()
        future: OperationFuture[R] = OperationFuture(
            self.home,
            operation,
            operation=call.route.operation,
            label=self._label(call, place),
            on_result=call.on_result,
            on_failure=call.on_failure,
        )
        try:
            operation.begin(future, call, place)
        except BaseException:
            place.leave()
            raise
        return future

    def perform(self, call: Call[R]) -> Coroutine[Any, Any, R]:
        """Start a direct call; the coroutine, which must run at home, gives its result.

        A submit takes its place now; anything else is sent when the coroutine runs. Cancelling it asks the server to
        cancel.
        """
        return self.begin(call)()

    def begin(self, call: Call[R]) -> Callable[[], Coroutine[Any, Any, R]]:
        """The same; the coroutine is made by whoever calls what this returns."""
        if call.route.kind != "submit":
            self.check_open()
            return partial(self._ask, call)
        operation: Operation[R] = Operation(self, direct=True)
        return partial(self._await_direct, self._start(call, operation), operation)

    def stream(self, call: Call[R]) -> Channel[R]:
        """Open a stream when its turn comes; its chunks arrive in the channel."""
        self.check_open()
        place = self.lane.take()
        channel: Channel[R] = Channel(self.home.call_soon)
        name = f"{call.route.operation}#{place.number}"
        try:
            job = self.home.spawn(self._pump(call, place, channel), name=name, group=self.tasks)
        except BaseException:
            place.leave()
            raise
        channel.on_leave(job.stop)
        closed = Failure.of(ClientClosedError(f"the client{self._of()} was closed during a stream"))
        job.ended.when_set(lambda: channel.finish(closed))
        job.ended.when_set(place.leave)
        return channel

    async def acceptance(self, future: OperationFuture[R]) -> OperationFuture[R]:
        """Wait until the submit is answered; one that its caller gave up on is remembered until close."""
        try:
            return await future.accepted()
        except asyncio.CancelledError:
            self.orphans.append(future)
            raise

    def wait_acceptance(self, future: OperationFuture[Any]) -> None:
        """As ``acceptance``, blocking; Ctrl-C leaves the operation to itself."""
        try:
            future.wait_accepted()
        except KeyboardInterrupt:
            self.orphans.append(future)
            raise

    async def cancel(self, ticket: str) -> bool:
        """Ask the server to cancel; return whether the operation will not take effect."""
        request = Request(
            method="POST",
            path=self.retrieval.cancel_path(ticket),
            headers=self.headers,
            good=frozenset({*range(200, 300), 409}),
        )
        return self.retrieval.cancelled(await self.service.connection.send(request))

    def attach(self, ticket: str, call: Call[R]) -> OperationFuture[R]:
        """The future of an operation accepted earlier, perhaps for another program; ``call`` decodes its result."""
        self.check_open()
        operation: Operation[R] = Operation(self)
        label = f"{call.route.operation} {ticket}{self._on()}, looked up at {call.site}"
        future = OperationFuture(
            self.home,
            operation,
            operation=call.route.operation,
            label=label,
            on_result=call.on_result,
            on_failure=call.on_failure,
        )
        operation.adopt(future, call, ticket)
        return future

    async def aclose(self) -> None:
        """End this client's tasks, and report what was accepted and never waited for; runs at home."""
        if self.closed:
            return
        self.closed = True
        for finish in self.at_close:
            try:
                await asyncio.to_thread(finish)
            except Exception:  # a hook may fail in any way, but keeps neither the others nor the end from coming
                _logger.exception("the hook %r, run at close%s, failed", finish, self._of())
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        self._report()

    # ------------------------------------------------------------------------------------- how it is done

    def request(self, call: Call[Any], number: int = 0, extra: Mapping[str, str] | None = None) -> Request:
        """The HTTP request of a call."""
        return Request(
            method=call.route.method,
            path=call.path,
            body=call.numbered(number),
            headers={**self.headers, **call.headers, **(extra or {})},
            key=call.key,
            timeout=call.timeout or self.service.connection.timeout,
        )

    async def _await_direct(self, future: OperationFuture[R], operation: Operation[R]) -> R:
        try:
            return await future.result_async()
        except asyncio.CancelledError:
            await operation.abandon(future, ABANDON_BUDGET)
            raise

    async def _ask(self, call: Call[R]) -> R:
        try:
            reply = await self.service.connection.send(self.request(call))
            return await off_loop(reply, lambda whole: read_direct(call, whole))
        except TGTinkerError as error:
            error.add_note(f"{call.route.operation}{self._on()}, called at {call.site}")
            raise

    async def _pump(self, call: Call[R], place: Place, channel: Channel[R]) -> None:
        def opened() -> None:
            place.leave()
            channel.open()

        try:
            await place.turn()
            self.check_open()
            pieces = self.service.connection.stream(self.request(call, place.number), opened)
            async with aclosing(pieces):
                reader = FrameReader()
                async for piece in pieces:
                    for frame in reader.feed(piece):
                        if "item" not in frame:
                            channel.finish(_ending(frame))
                            return
                        await channel.send(decoded(call.decode, frame["item"]))
            raise ServerUnreachableError("the stream broke off before its end")
        except TGTinkerError as error:
            channel.finish(Failure.of(error).with_note(self._label(call, place)))

    def _label(self, call: Call[Any], place: Place) -> str:
        return f"{call.route.operation} #{place.number}{self._on()}, submitted at {call.site}"

    def _on(self) -> str:
        return f" on {self.name}" if self.name else ""

    def _report(self) -> None:
        for future in self.orphans:
            if future.id and not future.outcome.settled:
                _logger.warning("%r was accepted by the server though its caller had been cancelled", future)
        if self.unwatched:
            named = ", ".join(self.unwatched.values())
            _logger.info("%d operations%s were never waited for: %s", len(self.unwatched), self._on(), named)

    def note_unwatched(self, ticket: str, label: str) -> None:
        """Remember an accepted operation until somebody waits for it."""
        self.unwatched[ticket] = label
        if len(self.unwatched) > _REMEMBERED:
            self.unwatched.pop(next(iter(self.unwatched)))


def _ending(frame: Mapping[str, Any]) -> Failure | None:
    error = frame.get("error")
    if error is None:
        return None
    return Failure.of(from_wire(error if isinstance(error, dict) else {"message": str(error)}))
