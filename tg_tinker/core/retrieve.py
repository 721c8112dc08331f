"""The outcome of one accepted operation: a single poller, however many wait, and none while nobody does.

Long polls are told how long to hold. A transient fault is tried again; one that lasts ends the waits of that moment and
leaves the outcome open; only what the server says of the operation itself settles the future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any, Generic, TypeVar

from tg_tinker.core.call import Call
from tg_tinker.core.reply import Reply
from tg_tinker.core.retrieval import Done, Failed, Pending, Retrieval
from tg_tinker.core.transport import Connection, Request
from tg_tinker.errors import (
    InvalidRequestError,
    ServerError,
    ServerRestartedError,
    TGTinkerError,
)
from tg_tinker.failure import Failure
from tg_tinker.futures import OperationFuture

__all__ = ["Poller", "decoded", "off_loop", "read_direct"]

R = TypeVar("R")
T = TypeVar("T")
HOLD = 30.0  # seconds that one poll is held at most
_CROWDED_HOLD = 1.0  # seconds, while other polls wait for a connection
_GRACE = 10.0  # seconds that an answer may be later than its hold
_GONE = frozenset({404, 409, 410})  # the server says that there will be no result
_PAUSES = (0.05, 1.0)  # seconds between polls of a server that does not hold them: the first, the longest
_TROUBLE_PAUSE = 5.0  # seconds between polls for a callback while the server cannot be reached
_LARGE = 256 * 1024  # bytes of a body that is decoded off the loop


class Poller(Generic[R]):
    """Fetches the outcome of ``ticket`` while somebody wants it."""

    def __init__(
        self,
        connection: Connection,
        retrieval: Retrieval,
        ticket: str,
        decode: Callable[[Any], R],
        headers: dict[str, str],
    ) -> None:
        self._connection = connection
        self._retrieval = retrieval
        self._ticket = ticket
        self._decode = decode
        self._headers = headers

    async def fetch(self, future: OperationFuture[R]) -> None:
        """Poll until the future is settled or nobody wants it any more."""
        pause = _PAUSES[0]
        while (remaining := future.outcome.wanted_until() - monotonic()) > 0:
            hold, asked_at = min(remaining, HOLD), monotonic()
            try:
                said = await self._ask(future, hold)
            except ServerRestartedError as error:
                future.fail(Failure.of(error))
                return
            except TGTinkerError as error:
                future.disturb(Failure.of(error))
                await asyncio.sleep(_TROUBLE_PAUSE if future.outcome.is_wanted() else 0)
                continue
            if said is None:
                return
            future.outcome.progress(said.status)
            if monotonic() - asked_at < hold / 2:
                await asyncio.sleep(min(pause, remaining))
                pause = min(2 * pause, _PAUSES[1])
            else:
                pause = _PAUSES[0]

    async def _ask(self, future: OperationFuture[R], hold: float) -> Pending | None:
        """Poll once and settle the future if the answer is final; otherwise return what it says."""
        if self._connection.polls.locked():
            hold = min(hold, _CROWDED_HOLD)
        request = Request(
            method="GET",
            path=self._retrieval.poll_path(self._ticket, hold),
            headers=self._headers,
            timeout=HOLD + _GRACE,  # a server that does not know ``wait`` holds as long as it likes
            good=self._retrieval.answers | _GONE,
        )
        async with self._connection.polls:
            reply = await self._connection.send(request)
        if reply.status in _GONE:
            future.fail(Failure.of(reply.error()))
            return None
        return await self._settle(future, reply)

    async def _settle(self, future: OperationFuture[R], reply: Reply) -> Pending | None:
        try:
            said = await off_loop(reply, self._interpret)
        except TGTinkerError as error:  # an answer that cannot be read does not get better
            future.fail(Failure.of(error))
            return None
        if isinstance(said, Pending):
            return said
        if isinstance(said, Failed):
            future.fail(Failure.of(said.error))
        else:
            future.settle(said.result)
        return None

    def _interpret(self, reply: Reply) -> Pending | Failed | Done:
        said = self._retrieval.read(reply)
        return Done(decoded(self._decode, said.result)) if isinstance(said, Done) else said


async def off_loop(reply: Reply, interpret: Callable[[Reply], T]) -> T:
    """Interpret a reply, in a thread where it is so large that the loop would stall."""
    if len(reply.body) < _LARGE:
        return interpret(reply)
    return await asyncio.to_thread(interpret, reply)


def read_direct(call: Call[T], reply: Reply) -> T:
    """The result of a request that is answered in one round trip."""
    return decoded(call.decode, reply if call.whole_reply else reply.json())


def decoded(decode: Callable[[Any], T], data: Any) -> T:
    """The result in an answer. Raises ``ServerError`` where the server sent something else."""
    try:
        return decode(data)
    except InvalidRequestError as error:
        raise ServerError(f"the server's answer does not fit: {error}", code="BAD_ANSWER") from error
