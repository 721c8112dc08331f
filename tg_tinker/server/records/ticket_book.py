"""Every ticket of this process: accepted once, settled once, cancelled, found by id or key, and in time forgotten.

Lives on the event loop. What comes from the scheduler's threads passes through ``TicketReport``.
"""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from tg_tinker.errors import FutureCancelledError, InvalidRequestError, QueueFullError, TGTinkerError
from tg_tinker.server.records.tickets import Ticket
from tg_tinker.server.work.lanes import Job, Lane
from tg_tinker.server.work.operations import Begin
from tg_tinker.server.work.scheduler import Scheduler, tell

MOST = 20_000  # ended tickets in memory at most, whatever their age


def key_reused() -> InvalidRequestError:
    """Say that an idempotency key came with another request than before."""
    return InvalidRequestError(
        "Idempotency-Key: this key was used for another request",
        field="Idempotency-Key",
        constraint="a new key for each operation",
        code="IDEMPOTENCY_KEY_REUSED",
    )


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
            raise key_reused()
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
        cancelled = ticket.status == "cancelled"
        if cancelled:
            ticket.tell_failure()  # whoever asked is being told that it has no effect
        return cancelled

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

    def close(self, error: TGTinkerError) -> None:
        """Fail whatever has not ended: the server is about to."""
        for ticket in self:
            self.settle(ticket, None, copy.copy(error))

    def _forget_old(self) -> None:
        """Let go of what was kept long enough; and sooner, of large results that the database has."""
        if monotonic() < self._swept + 1.0:
            return
        self._swept = monotonic()
        horizon, size = self._swept - self._kept, sum(ticket.size for ticket in self._ended.values())
        for ticket in list(self._ended.values()):
            if ticket.ended < horizon or len(self._ended) > MOST:
                self.forget(ticket)
            elif size > self._bytes_kept and ticket.stored:
                size -= ticket.size
                ticket.drop()
            elif size <= self._bytes_kept:
                return

    def forget(self, ticket: Ticket) -> None:
        """Let go of an ended ticket."""
        self._ended.pop(ticket.id, None)
        self._tickets.pop((ticket.tenant, ticket.id), None)
        if ticket.key is not None and self._by_key.get((ticket.tenant, ticket.key)) is ticket:
            del self._by_key[ticket.tenant, ticket.key]
