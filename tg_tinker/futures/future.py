"""The handle of an accepted (or about to be accepted) operation: settles once, waits from any thread and any loop.

A timeout, a cancelled task or Ctrl-C ends only that wait: the operation goes on and can be waited for again.
It does no I/O of its own; a ``Backer`` on the client's home fetches the outcome while somebody wants it.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar, cast

from tg_tinker.errors import (
    ClientClosedError,
    FutureCancelledError,
    FutureTimeoutError,
    UnretrievedOperationWarning,
)
from tg_tinker.failure import Failure
from tg_tinker.futures.backing import Backer, Home
from tg_tinker.futures.outcome import Outcome
from tg_tinker.threads.latch import Latch
from tg_tinker.types import arguments, checks

__all__ = ["APIFuture", "FutureHandle", "OperationFuture"]

R = TypeVar("R")
_logger = logging.getLogger("tg_tinker.futures")


class OperationFuture(Generic[R]):
    """An operation on its way: block on ``result()``, or ``await`` it, as often and from wherever you like."""

    def __init__(
        self,
        home: Home,
        backer: Backer,
        *,
        operation: str,
        label: str,
        on_result: Callable[[R], None] | None = None,
        on_failure: Callable[[Failure], None] | None = None,
    ) -> None:
        self._home = home
        self._backer: Backer | None = backer
        self._operation = operation
        self._label = label
        self._on_result = on_result
        self._on_failure = on_failure
        self._pid = os.getpid()
        self._id = ""
        self._accepted = Latch()
        self._outcome: Outcome[R] = Outcome()
        self._looked_at = False

    # ------------------------------------------------------------------------------------------ what it is

    @property
    def id(self) -> str:
        """The server's id of the operation; empty until the server has accepted it."""
        return self._id

    @property
    def operation_id(self) -> str:
        """The same as ``id``."""
        return self._id

    @property
    def future_id(self) -> str:
        """The same as ``id``."""
        return self._id

    @property
    def operation(self) -> str:
        """The name of the operation, such as ``"forward_backward"``."""
        return self._operation

    @property
    def status(self) -> str:
        """What is known now: "pending", "running", "completed", "failed" or "cancelled". Never blocks."""
        self._look()
        return self._outcome.status

    def __repr__(self) -> str:
        """Name the operation and say how far it is."""
        name = f"{self._operation} {self._id}" if self._id else self._label.partition(",")[0]
        status = self._outcome.status if self._id or self._outcome.settled else "submitting"
        return f"<OperationFuture {name}: {status}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, and say what to pass instead."""
        raise TypeError("a future cannot be pickled: pass future.id, and call service.get_future(id) over there")

    def __del__(self) -> None:
        """Warn of a failure that nobody looked at; no I/O, no loop."""
        outcome = getattr(self, "_outcome", None)
        if outcome is None or outcome.failure is None or self._looked_at or sys.is_finalizing():
            return
        if not issubclass(outcome.failure.cls, (ClientClosedError, FutureCancelledError)):
            message = f"{self._label}, failed and nobody looked at it: {outcome.failure.error()}"
            warnings.warn(UnretrievedOperationWarning(message), stacklevel=2, source=self)

    # -------------------------------------------------------------------------------------------- waiting

    def result(self, timeout: float | None = None) -> R:
        """Block until the operation is done and return its result.

        Raises ``FutureTimeoutError`` after ``timeout`` seconds (the operation goes on), and the operation's own
        typed error where it failed or was cancelled.
        """
        if not self._wait(timeout):
            raise self._unfinished(timeout)
        self._looked_at = True
        if self._outcome.failure is not None:
            raise self._outcome.failure.error()
        return cast("R", self._outcome.value)

    async def result_async(self, timeout: float | None = None) -> R:
        """Wait in a coroutine, on any asyncio loop; otherwise as ``result``."""
        if not await self._wait_async(timeout):
            raise self._unfinished(timeout)
        self._looked_at = True
        if self._outcome.failure is not None:
            raise self._outcome.failure.error()
        return cast("R", self._outcome.value)

    def __await__(self) -> Generator[Any, None, R]:
        """Give the result: ``value = await future``."""
        return self.result_async().__await__()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the operation is done, however it ended; return whether that was in time."""
        return self._wait(timeout, raises=False)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until the operation is done and return its error, or None where it succeeded."""
        if not self._wait(timeout):
            raise self._unfinished(timeout)
        self._looked_at = True
        return None if self._outcome.failure is None else self._outcome.failure.error()

    def _wait(self, timeout: float | None, *, raises: bool = True) -> bool:
        seconds = arguments.patience("timeout", timeout)
        if self._outcome.settled:
            return True
        self._home.check_blocking(f"{self._operation}(...).result()")
        self._check_process()
        with self._outcome.waiting(seconds) as current:
            self._wake()
            current.latch.wait(seconds)
        return self._outcome.ended(current, raises=raises)

    async def _wait_async(self, timeout: float | None) -> bool:
        seconds = arguments.patience("timeout", timeout)
        if self._outcome.settled:
            return True
        self._check_process()
        with self._outcome.waiting(seconds) as current:
            self._wake()
            await current.latch.wait_async(seconds)
        return self._outcome.ended(current)

    def _unfinished(self, timeout: float | None) -> FutureTimeoutError:
        message = f"{self._label}, is not done after {timeout} s; it goes on: wait again, or cancel() it"
        return FutureTimeoutError(message, future_id=self._id or None, timeout=timeout)

    def _check_process(self) -> None:
        if os.getpid() != self._pid and not self._outcome.settled:
            message = (
                f"{self._label}, was submitted by process {self._pid}; this forked child cannot wait for it. "
                "Pass future.id and call service.get_future(id) here"
            )
            raise ClientClosedError(message)

    # ------------------------------------------------------------------------------------ without waiting

    def done(self) -> bool:
        """Whether the outcome is known, good or bad. Never blocks; asking sees to it that it is being fetched."""
        self._look()
        return self._outcome.settled

    is_done = done

    def is_success(self) -> bool:
        """Whether the operation is known to have succeeded. Never blocks."""
        return self.done() and self._outcome.failure is None

    def is_failed(self) -> bool:
        """Whether the operation is known to have failed or to have been cancelled. Never blocks."""
        failed = self.done() and self._outcome.failure is not None
        self._looked_at = self._looked_at or failed
        return failed

    def get_error(self) -> BaseException | None:
        """The operation's error where it is known to have failed, else None. Never blocks."""
        return self.exception() if self.is_failed() else None

    def add_done_callback(self, callback: Callable[[OperationFuture[R]], object]) -> None:
        """Have ``callback(future)`` called on the client's home once the outcome is known; its errors are logged."""
        self._check_process()
        if not callable(callback):
            raise checks.refuse("callback", "a function of one future", callback)
        if self._outcome.call_when_settled(partial(self._call_back, callback)):
            self._wake()
        else:
            self._call_back(callback)

    def as_concurrent(self) -> concurrent.futures.Future[R]:
        """A view for ``concurrent.futures.wait`` and friends; cancelling the view does not cancel the operation."""
        view: concurrent.futures.Future[R] = concurrent.futures.Future()
        view.set_running_or_notify_cancel()
        self.add_done_callback(lambda future: future._copy_to(view))
        return view

    def _copy_to(self, view: concurrent.futures.Future[R]) -> None:
        self._looked_at = True
        if self._outcome.failure is not None:
            view.set_exception(self._outcome.failure.error())
        else:
            view.set_result(cast("R", self._outcome.value))

    def _call_back(self, callback: Callable[[OperationFuture[R]], object]) -> None:
        try:
            self._home.call_soon(_guarded, callback, self)
        except ClientClosedError:
            _guarded(callback, self)

    def _look(self) -> None:
        if not self._outcome.settled and os.getpid() == self._pid:
            self._outcome.glance = self._outcome.watched = True
            with suppress(ClientClosedError):  # its loop is gone: nothing more will be known
                self._wake()

    def _wake(self) -> None:
        self._home.call_soon(self._wake_backer)

    def _wake_backer(self) -> None:
        if self._backer is not None:
            self._backer.wake(self)

    # ----------------------------------------------------------------------------------------- cancelling

    def cancel(self) -> bool:
        """Ask the server to cancel; return whether the operation will really not take effect."""
        self._home.check_blocking(f"{self._operation}(...).cancel()")
        return self._home.run(self._cancel())

    async def cancel_async(self) -> bool:
        """Ask the server to cancel, from a coroutine; otherwise as ``cancel``."""
        return await self._home.hop(self._cancel)

    async def _cancel(self) -> bool:
        self._check_process()
        backer = self._backer
        if backer is not None and await backer.cancel(self):
            message = "the operation was cancelled; it had no effect"
            self.fail(Failure.of(FutureCancelledError(message, future_id=self._id or None)))
        return self._outcome.status == "cancelled"

    # --------------------------------------------------------------------- for the backer and the clients

    @property
    def label(self) -> str:
        """The operation, its number, its run, and where it was submitted: for notes and logs."""
        return self._label

    @property
    def outcome(self) -> Outcome[R]:
        """Its state, for whoever fetches it."""
        return self._outcome

    def accept(self, ticket: str) -> None:
        """The server has taken the operation on and calls it ``ticket``."""
        self._id = ticket
        self._accepted.set()

    def wait_accepted(self) -> None:
        """Block until the server has answered the submit; raises its rejection."""
        self._accepted.wait()
        self._raise_rejection()

    async def accepted(self) -> OperationFuture[R]:
        """Wait until the server has answered the submit; raises its rejection."""
        await self._accepted.wait_async()
        self._raise_rejection()
        return self

    async def until_answered(self) -> bool:
        """Wait until the server has answered the submit; return whether it accepted."""
        await self._accepted.wait_async()
        return bool(self._id)

    def _raise_rejection(self) -> None:
        if self._outcome.failure is not None and not self._id:
            self._looked_at = True
            raise self._outcome.failure.error()

    def track(self) -> None:
        """Have the outcome fetched whether or not anybody waits."""
        self._outcome.tracked = True
        self._wake()

    def disturb(self, failure: Failure) -> None:
        """End the waits of this moment with ``failure``, leaving the outcome open."""
        self._outcome.disturb(failure.with_note(self._label))

    def settle(self, value: R) -> None:
        """The operation succeeded with ``value``; the client's bookkeeping runs before anybody sees it."""
        try:
            if self._on_result is not None and not self._outcome.settled:
                self._on_result(value)
        except Exception as error:  # noqa: BLE001 - whatever a client's bookkeeping raises, the future must settle
            self.fail(Failure.of(error))
        else:
            self._outcome.settle("completed", value)
            self._let_go()

    def fail(self, failure: Failure) -> None:
        """The operation failed, was rejected, or was cancelled; here, too, the client's bookkeeping comes first."""
        if self._on_failure is not None and not self._outcome.settled:
            self._on_failure(failure)
        cancelled = issubclass(failure.cls, FutureCancelledError)
        self._outcome.settle("cancelled" if cancelled else "failed", None, failure.with_note(self._label))
        self._let_go()

    def _let_go(self) -> None:
        self._backer = self._on_result = self._on_failure = None
        self._accepted.set()


def _guarded(callback: Callable[[OperationFuture[R]], object], future: OperationFuture[R]) -> None:
    try:
        callback(future)
    except BaseException:  # a callback may fail in any way, but not end the loop it is called on
        _logger.exception("the callback %r of %r failed", callback, future)


FutureHandle = OperationFuture
APIFuture = OperationFuture
