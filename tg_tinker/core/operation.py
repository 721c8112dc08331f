"""One submitted operation: waits its turn, is posted, accepted, polled, and cancelled where asked; runs at home."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tg_tinker.bridge import Job
from tg_tinker.core.call import Call
from tg_tinker.core.lane import Place
from tg_tinker.core.retrieve import Poller, off_loop, read_direct
from tg_tinker.errors import ClientClosedError, FutureCancelledError, OperationFailedError, TGTinkerError
from tg_tinker.failure import Failure
from tg_tinker.futures import OperationFuture
from tg_tinker.wire import headers

if TYPE_CHECKING:
    from tg_tinker.core.run import RunCore

__all__ = ["Operation", "left_open"]

R = TypeVar("R")


class Operation(Generic[R]):
    """What stands behind a future of ``RunCore``; it holds no reference to the future, so that one can be dropped."""

    def __init__(self, run: RunCore, *, direct: bool = False) -> None:
        self._run = run
        self._direct = direct
        self._context = contextvars.copy_context()  # polls run in the context of the submit, whoever waits first
        self._sent = False
        self._withdrawn = False
        self._refuse: Callable[[], None] = _nothing  # tells those behind it that its gradient will not come
        self._submit: Job[None] | None = None
        self._poller: Poller[R] | None = None
        self._polling: Job[None] | None = None

    # ------------------------------------------------------------------------------------------- submit

    def begin(self, future: OperationFuture[R], call: Call[R], place: Place) -> None:
        """Schedule the submit."""
        name = f"{future.operation}#{place.number}"
        if call.adds_gradient:
            self._refuse = partial(place.refuse, f"{future.operation} #{place.number}")
        submit = self._run.home.spawn(
            self._send(future, call, place), name=name, group=self._run.tasks, context=self._context
        )
        self._submit = submit
        submit.ended.when_set(place.leave)
        submit.ended.when_set(lambda: self._after_submit(submit, future))

    def adopt(self, future: OperationFuture[R], call: Call[R], ticket: str) -> None:
        """The operation was accepted long ago."""
        self._accept(future, call, ticket)

    async def _send(self, future: OperationFuture[R], call: Call[R], place: Place) -> None:
        try:
            async with place:
                self._check(call, place)
                self._sent = True
                await self._post(future, call, place)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the future and the lane must hear of it
            self._refuse()
            future.fail(Failure.of(error))

    def _check(self, call: Call[R], place: Place) -> None:
        self._run.check_open()
        if call.applies_gradient and place.spoiler is not None:
            message = (
                f"{call.route.operation} was not sent: {place.spoiler} before it failed or was cancelled, "
                "so it would have applied an incomplete gradient"
            )
            raise OperationFailedError(message, operation=call.route.operation)

    async def _post(self, future: OperationFuture[R], call: Call[R], place: Place) -> None:
        extra = {headers.PREFER: headers.RESPOND_ASYNC} if self._direct else None
        reply = await self._run.service.connection.send(self._run.request(call, place.number, extra))
        if self._direct and reply.status != 202:
            future.settle(await off_loop(reply, lambda whole: read_direct(call, whole)))
        else:
            self._accept(future, call, self._run.retrieval.ticket(reply.json()))

    def _accept(self, future: OperationFuture[R], call: Call[R], ticket: str) -> None:
        run = self._run
        self._poller = Poller(run.service.connection, run.retrieval, ticket, call.decode, run.headers)
        future.accept(ticket)
        if call.eager:
            future.track()
        if not future.outcome.watched:
            run.note_unwatched(ticket, future.label)

    def _after_submit(self, submit: Job[None], future: OperationFuture[R]) -> None:
        """However the submit ended, the future knows."""
        self._submit = None
        if self._withdrawn and not future.id:
            future.fail(Failure.of(FutureCancelledError("cancelled before it was sent")))
        elif not future.id and not future.outcome.settled:
            future.fail(left_open(submit.error()))
        if future.outcome.is_wanted():
            self.wake(future)

    # ------------------------------------------------------------------------------------------ outcome

    def wake(self, future: OperationFuture[Any]) -> None:
        """See to it that the outcome is being fetched, once there is something to fetch."""
        self._run.unwatched.pop(future.id, None)
        if self._poller is None or self._polling is not None:
            return
        try:
            self._run.check_open()
            self._polling = self._run.home.spawn(
                self._poller.fetch(future),
                name=f"poll {future.operation} {future.id}",
                group=self._run.tasks,
                context=self._context,
            )
        except ClientClosedError as error:
            future.fail(Failure.of(error))
            return
        polling = self._polling
        polling.ended.when_set(lambda: self._after_poll(polling, future))

    def _after_poll(self, polling: Job[None], future: OperationFuture[Any]) -> None:
        self._polling, error = None, polling.error()
        if error is not None:
            future.fail(left_open(error))
        elif future.outcome.is_wanted():
            self.wake(future)

    # ----------------------------------------------------------------------------------------- cancelling

    async def cancel(self, future: OperationFuture[Any]) -> bool:
        """Withdraw a submit that still waits its turn; ask the server about one that is accepted."""
        if self._submit is not None and not self._sent:
            await self._withdraw(self._submit)
            return True
        if not await future.until_answered():
            return False
        return await self._run.cancel(future.id)

    async def _withdraw(self, submit: Job[None]) -> None:
        self._withdrawn = True
        self._refuse()
        submit.stop()
        await submit.ended.wait_async()

    async def abandon(self, future: OperationFuture[Any], seconds: float) -> None:
        """Nobody will ask for the result: take it back as far as that goes, within ``seconds``."""
        with contextlib.suppress(TGTinkerError, TimeoutError):
            async with asyncio.timeout(seconds):
                if self._submit is not None:
                    await self._withdraw(self._submit)
                if future.id and not future.outcome.settled:
                    await self._run.cancel(future.id)


def _nothing() -> None:
    """No gradient is missing without this operation."""


def left_open(error: BaseException | None) -> Failure:
    """Why a task ended without an outcome: the client was closed, or something unforeseen was raised."""
    if error is None or isinstance(error, asyncio.CancelledError):
        return Failure.of(ClientClosedError("the client was closed before the operation was done"))
    if isinstance(error, Exception):
        return Failure.of(error)
    failed = OperationFailedError(f"{type(error).__name__} was raised in the background: {error}")
    failed.__cause__ = error
    return Failure.of(failed)
