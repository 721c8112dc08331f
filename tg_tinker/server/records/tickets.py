"""Tickets: accepted operations, from acceptance to an outcome that can be fetched for an hour.

A ticket lives on the event loop and is waited for by event. How its operation runs is the scheduler's; keeping it
beyond this process is ``journal``'s.
"""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic
from typing import Any, cast

from tg_tinker.errors import (
    FutureCancelledError,
    OperationFailedError,
    TGTinkerError,
)
from tg_tinker.failure import Failure
from tg_tinker.server.work.lanes import Job, Lane
from tg_tinker.types.loops_results import ForwardBackwardOutput
from tg_tinker.wire import codec
from tg_tinker.wire.tg import ENDED, FutureInfo, Status


class Held(ABC):
    """An accepted operation that handlers can ask after, wherever it is kept."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether it has ended, well or badly."""

    @abstractmethod
    async def wait(self, seconds: float | None) -> bool:
        """Wait for the end, at most ``seconds``; say whether it has come."""

    @abstractmethod
    async def body(self) -> bytes:
        """The encoded result of one that ended well."""

    @abstractmethod
    def error(self) -> TGTinkerError | None:
        """A new exception that says how it failed, or None."""

    @abstractmethod
    def tell_failure(self) -> None:
        """Note that the client is being told of the failure now."""

    @abstractmethod
    def info(self) -> FutureInfo:
        """As it crosses the wire."""


class Ticket(Held):
    """One accepted operation of this process; lives on the event loop."""

    def __init__(
        self, *, tenant: str, run_id: str, operation: str, key: str | None, digest: str, request_id: str | None
    ) -> None:
        self.id = f"fut-{uuid.uuid4()}"
        self.tenant = tenant
        self.run_id = run_id
        self.operation = operation
        self.key = key
        self.digest = digest
        self.request_id = request_id
        self.status: Status = "pending"
        self.created_at = datetime.now(UTC)
        self.started_at: datetime | None = None
        self.completed_at: datetime | None = None
        self.accepted = monotonic()
        self.ended = 0.0
        self.failure_told: float | None = None
        self.begun = False  # a training pass whose turn has come; device thread
        self.result: Any = None  # until it is encoded
        self.stored = False  # its end is in the database
        self.dropped = False  # its result is there and not here
        self.failure: Failure | None = None
        self.produced: list[str] = []  # artifact ids, for the audit log
        self.consumed: list[str] = []
        self.dp_metrics: dict[str, Any] | None = None
        self.job: Job | None = None
        self.lane: Lane | None = None
        self._encoded: bytes | None = None
        self._calls: list[Callable[[Any], object]] = []
        self._done = asyncio.Event()

    def __repr__(self) -> str:
        """Operation, id, status."""
        return f"<Ticket {self.operation} {self.id}: {self.status}>"

    @property
    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        return self.status in ENDED

    async def wait(self, seconds: float | None) -> bool:
        """Wait for the end, at most ``seconds``; say whether it has come."""
        if not self.done and seconds != 0:
            try:
                await asyncio.wait_for(self._done.wait(), seconds)
            except TimeoutError:
                return False
        return self.done

    def when_done(self, call: Callable[[Any], object]) -> None:
        """Call with the result (None for a failure) at the end; it must not have come yet."""
        self._calls.append(call)

    async def body(self) -> bytes:
        """The encoded result; it is encoded once, large ones in a thread."""
        if self._encoded is None:
            large = isinstance(self.result, ForwardBackwardOutput)
            encoded = await asyncio.to_thread(codec.dumps, self.result) if large else codec.dumps(self.result)
            self._encoded = encoded
            self.result = None
        return self._encoded

    @property
    def size(self) -> int:
        """Bytes of the encoded result."""
        return len(self._encoded or b"")

    def drop(self) -> None:
        """Let go of the result, which the database has; the ticket itself goes on answering retries."""
        self._encoded, self.dropped = None, True

    def error(self) -> TGTinkerError | None:
        """A new exception that says how it failed, or None."""
        return None if self.failure is None else cast("TGTinkerError", self.failure.error())

    def tell_failure(self) -> None:
        """Note that the client is being told of the failure now, if it was not before."""
        if self.failure_told is None:
            self.failure_told = monotonic()

    def info(self) -> FutureInfo:
        """The ticket as it crosses the wire."""
        return FutureInfo(
            future_id=self.id,
            status=self.status,
            created_at=self.created_at,
            training_client_id=self.run_id,
            operation=self.operation,
            started_at=self.started_at,
            completed_at=self.completed_at,
        )

    def begin(self) -> None:
        """Mark the start of execution."""
        if not self.done:
            self.status, self.started_at = "running", datetime.now(UTC)

    def settle(self, result: Any, error: BaseException | None) -> None:
        """Mark the end; the first end counts."""
        if self.done:
            return
        self.completed_at, self.ended = datetime.now(UTC), monotonic()
        self.job = self.lane = None
        if error is None:
            self.status, self.result = "completed", result
        else:
            self.failure = Failure.of(self._typed(error))
            self.status = "cancelled" if isinstance(error, FutureCancelledError) else "failed"
        self._done.set()
        calls, self._calls = self._calls, []
        for call in calls:
            call(result)

    def _typed(self, error: BaseException) -> TGTinkerError:
        if not isinstance(error, TGTinkerError):
            message = f"{self.operation} failed while it ran: {type(error).__name__}: {error}"
            typed: TGTinkerError = OperationFailedError(message, operation=self.operation)
        else:
            typed = error
        typed.request_id = self.request_id
        if isinstance(typed, FutureCancelledError):
            typed.details["future_id"] = self.id
        return typed


async def outcome_of(held: Held) -> bytes:
    """The encoded result of an ended operation, or raise its error; the failure then counts as told."""
    error = held.error()
    if error is None:
        return await held.body()
    held.tell_failure()
    raise error
