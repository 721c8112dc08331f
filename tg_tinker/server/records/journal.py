"""Keeps tickets in the database: written in the background, found again by id after a restart.

Nothing on the way of an operation waits for the database.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import ServerError, TGTinkerError
from tg_tinker.server.records.background_writer import BackgroundWriter
from tg_tinker.server.records.tickets import Held, Ticket
from tg_tinker.server.tasks import whole
from tg_tinker.wire.errors import from_wire
from tg_tinker.wire.tg import ENDED, FutureInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tg_tinker.server.ownership import Ownership
    from tg_tinker.server.records.recovery import Recovery
    from tg_tinker.store.database import Database
    from tg_tinker.store.rows import FutureRow


@attrs.frozen(eq=False)
class Stored(Held):
    """An operation that another server process accepted, as the database knows it."""

    row: FutureRow

    @property
    def id(self) -> str:
        """The future's id."""
        return self.row.future_id

    @property
    def key(self) -> str | None:
        """The idempotency key of its request."""
        return self.row.idempotency_key

    @property
    def run_id(self) -> str | None:
        """Its run."""
        return self.row.run_id

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.row.status in ENDED

    async def wait(self, seconds: float | None) -> bool:
        """Nothing here hears of its end; give whoever asks the time to ask again."""
        if not self.done:
            await asyncio.sleep(min(1.0, seconds or 0.0))
        return self.done

    async def body(self) -> bytes:
        """Its encoded result."""
        return self.row.result or b"null"

    def error(self) -> TGTinkerError | None:
        """How it failed, if it did."""
        return None if self.row.error is None else from_wire(self.row.error)

    def tell_failure(self) -> None:
        """Nothing depends on it any more."""

    def info(self) -> FutureInfo:
        """As it crosses the wire."""
        return FutureInfo(
            future_id=self.row.future_id,
            status=self.row.status,  # type: ignore[arg-type]  # only statuses are ever written
            created_at=self.row.created_at,
            training_client_id=self.row.run_id,
            operation=self.row.operation,
            started_at=self.row.started_at,
            completed_at=self.row.completed_at,
        )


class Journal:
    """Writes tickets as they change, and reads those that are not in memory."""

    def __init__(self, database: Database, ownership: Ownership, recovery: Recovery, *, kept: float) -> None:
        self._database = database
        self._ownership = ownership
        self._recovery = recovery
        self._kept = kept
        self._writer: BackgroundWriter[Ticket] = BackgroundWriter("the journal of futures", self._write, self._give_up)
        self._known_tenants: set[str] = set()

    def start(self) -> None:
        """Begin writing."""
        self._writer.start()

    async def aclose(self) -> bool:
        """Write what is left; whether nothing was lost."""
        return await self._writer.aclose()

    def note(self, ticket: Ticket) -> None:
        """Write this ticket soon."""
        self._writer.put(ticket.id, ticket)

    async def find(self, tenant: str, future_id: str) -> Stored | None:
        """A future by its id, or by the idempotency key of its request."""
        return await whole(self._find(tenant, future_id))

    async def _find(self, tenant: str, future_id: str) -> Stored | None:
        row = await self._database.get_future(tenant, future_id) or await self._database.find_future(tenant, future_id)
        if row is not None and not row.finished and self._ownership.is_dead(row.owner):
            await self._recovery.after(row.owner)
            row = await self._database.get_future(tenant, row.future_id)
        return None if row is None else Stored(row)

    async def list(self, tenant: str, *, run_id: str | None, status: str | None, limit: int) -> list[FutureInfo]:
        """A tenant's futures, newest first, of this process and of others."""
        await self.flush()
        rows = await self._database.list_futures(tenant, run_id=run_id, status=status, limit=limit)
        return [Stored(row).info() for row in rows]

    async def flush(self) -> None:
        """Wait until everything noted so far is written. Raises ``ServerError`` if that takes too long."""
        await self._writer.flush()

    async def _write(self, tickets: Sequence[Ticket]) -> None:
        for tenant in {ticket.tenant for ticket in tickets} - self._known_tenants:
            await self._database.add_tenant(tenant, datetime.now(UTC))
            self._known_tenants.add(tenant)
        rows = [await self._row(ticket) for ticket in tickets]
        await self._database.save_futures(rows)
        for ticket, row in zip(tickets, rows, strict=True):
            ticket.stored = row.finished

    async def _give_up(self, ticket: Ticket, error: Exception) -> None:
        """Keep at least that there was such an operation; as long as this process lives, the ticket has the outcome."""
        message = f"the outcome of this operation could not be kept ({type(error).__name__}); the server's log says why"
        lost = ServerError(message, code="RESULT_NOT_KEPT")
        await self._database.save_futures([attrs.evolve(self._bare(ticket), status="failed", error=_body(lost))])

    async def _row(self, ticket: Ticket) -> FutureRow:
        row, error = self._bare(ticket), ticket.error()
        if error is not None:
            return attrs.evolve(row, error=_body(error))
        return attrs.evolve(row, result=await ticket.body()) if row.finished else row

    def _bare(self, ticket: Ticket) -> FutureRow:
        """The row of a ticket, but for its result and its error."""
        from tg_tinker.store.rows import FutureRow

        info = ticket.info()
        return FutureRow(
            future_id=info.future_id,
            tenant_id=ticket.tenant,
            run_id=ticket.run_id,
            operation=ticket.operation,
            status=info.status,
            owner=self._ownership.name,
            created_at=info.created_at,
            idempotency_key=ticket.key,
            started_at=info.started_at,
            completed_at=info.completed_at,
            expires_at=None if info.completed_at is None else info.completed_at + timedelta(seconds=self._kept),
        )


def _body(error: TGTinkerError) -> dict[str, Any]:
    fields: dict[str, Any] = error.to_wire()["error"]
    return fields
