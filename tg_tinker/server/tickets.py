"""Tickets: accepted operations, from acceptance to an outcome that can be fetched for an hour.

A ticket lives on the event loop and is waited for by event. How its operation runs is the scheduler's; keeping it
beyond this process is ``journal``'s.
"""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from time import monotonic
from typing import Any, cast

from tg_tinker.errors import (
    Failure,
    FutureCancelledError,
    InvalidRequestError,
    OperationFailedError,
    QueueFullError,
    ServerRestartedError,
    TGTinkerError,
)
from tg_tinker.server.lanes import Job, Lane
from tg_tinker.server.operations import Begin
from tg_tinker.server.scheduler import Scheduler, tell
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
        self.result: Any = None  # until it is encoded
        self.stored = False  # its end is in the database
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


class TicketReport:
    """Carries what the scheduler's threads say about a job to its ticket on the loop."""

    def __init__(self, tickets: Tickets, ticket: Ticket) -> None:
        self._tickets = tickets
        self._ticket = ticket

    def started(self) -> None:
        """From the device thread."""
        tell(self._tickets.loop, self._ticket.begin)

    def completed(self, result: Any) -> None:
        """From the device thread, or one for offline work."""
        tell(self._tickets.loop, self._tickets.settle, self._ticket, result, None)

    def failed(self, error: BaseException) -> None:
        """From the device thread, or one for offline work."""
        tell(self._tickets.loop, self._tickets.settle, self._ticket, None, error)


class Tickets:
    """Every ticket of this process that has not been forgotten yet."""

    def __init__(self, scheduler: Scheduler, *, kept: float, bytes_kept: int, queue_limit: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.on_accept: list[Callable[[Ticket], None]] = []
        self.on_end: list[Callable[[Ticket], None]] = []
        self._scheduler = scheduler
        self._kept = kept
        self._bytes_kept = bytes_kept
        self._queue_limit = queue_limit
        self._tickets: OrderedDict[tuple[str, str], Ticket] = OrderedDict()
        self._by_key: dict[tuple[str, str], Ticket] = {}
        self._ended: OrderedDict[str, Ticket] = OrderedDict()
        self._unfinished: dict[str, int] = {}
        self._swept = 0.0

    def __len__(self) -> int:
        """How many are known."""
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        """All that are known, oldest first."""
        return iter(list(self._tickets.values()))

    def repeated(self, ticket: Ticket) -> Ticket | None:
        """The ticket that a retried request already got.

        Raises ``InvalidRequestError`` when the key was used for something else.
        """
        known = None if ticket.key is None else self._by_key.get((ticket.tenant, ticket.key))
        if known is None:
            return None
        if (known.digest, known.run_id) != (ticket.digest, ticket.run_id):
            raise InvalidRequestError(
                "Idempotency-Key: this key was used for another request",
                field="Idempotency-Key",
                constraint="a new key for each operation",
                code="IDEMPOTENCY_KEY_REUSED",
            )
        return known

    def accept(self, ticket: Ticket, lane: Lane, begin: Begin) -> Ticket:
        """Take an operation into its run's order, unless the ticket's key shows that it is there already.

        Raises ``QueueFullError`` when the tenant has too much waiting.
        """
        known = self.repeated(ticket)
        if known is not None:
            return known
        self._forget_old()
        if self._unfinished.get(ticket.tenant, 0) >= self._queue_limit:
            raise QueueFullError(f"{self._queue_limit} operations are waiting; try again later", retry_after=1.0)
        job = Job(ticket.operation, begin, TicketReport(self, ticket))
        ticket.job, ticket.lane = job, lane
        self._scheduler.submit(lane, job)
        self._unfinished[ticket.tenant] = self._unfinished.get(ticket.tenant, 0) + 1
        self._tickets[ticket.tenant, ticket.id] = ticket
        if ticket.key is not None:
            self._by_key[ticket.tenant, ticket.key] = ticket
        for hear in self.on_accept:
            hear(ticket)
        return ticket

    def settle(self, ticket: Ticket, result: Any, error: BaseException | None) -> None:
        """Record how it ended."""
        if ticket.done:
            return
        ticket.settle(result, error)
        self._unfinished[ticket.tenant] -= 1
        self._ended[ticket.id] = ticket
        for hear in self.on_end:
            hear(ticket)

    async def cancel(self, ticket: Ticket) -> bool:
        """Keep a queued operation from running, or stop one that runs; say whether it was kept from completing."""
        self.stop(ticket)
        await ticket.wait(None)
        return ticket.status == "cancelled"

    def stop(self, ticket: Ticket) -> None:
        """Ask for the same without waiting for the end."""
        if ticket.job is None or ticket.lane is None:
            return
        if self._scheduler.cancel(ticket.lane, ticket.job):
            self.settle(ticket, None, FutureCancelledError(f"{ticket.operation} was cancelled before it ran"))

    def find(self, tenant: str, ticket_id: str) -> Ticket | None:
        """A tenant's ticket, by its id or by the idempotency key of its request."""
        return self._tickets.get((tenant, ticket_id)) or self._by_key.get((tenant, ticket_id))

    def of_tenant(self, tenant: str) -> list[Ticket]:
        """A tenant's tickets, newest first."""
        return [ticket for ticket in reversed(self._tickets.values()) if ticket.tenant == tenant]

    def close(self) -> None:
        """Fail whatever has not ended: the server is about to."""
        for ticket in self:
            self.settle(ticket, None, ServerRestartedError("the server was shut down before the operation ended"))

    def _forget_old(self) -> None:
        """Let go of what was kept long enough; and sooner, of large results that the database has."""
        if monotonic() < self._swept + 1.0:
            return
        self._swept = monotonic()
        horizon, size = self._swept - self._kept, sum(ticket.size for ticket in self._ended.values())
        for ticket in list(self._ended.values()):
            crowded = size > self._bytes_kept and ticket.stored
            if not (crowded or ticket.ended < horizon):
                return
            size -= ticket.size
            self.forget(ticket)

    def forget(self, ticket: Ticket) -> None:
        """Let go of an ended ticket."""
        self._ended.pop(ticket.id, None)
        self._tickets.pop((ticket.tenant, ticket.id), None)
        if ticket.key is not None and self._by_key.get((ticket.tenant, ticket.key)) is ticket:
            del self._by_key[ticket.tenant, ticket.key]


async def outcome_of(held: Held) -> bytes:
    """The encoded result of an ended operation, or raise its error; the failure then counts as told."""
    error = held.error()
    if error is None:
        return await held.body()
    held.tell_failure()
    raise error
