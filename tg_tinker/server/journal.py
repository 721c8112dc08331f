"""Keeps tickets in the database: written in the background, found again by id after a restart.

Nothing on the way of an operation waits for the database.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import attrs

from tg_tinker.errors import ServerRestartedError, TGTinkerError, from_wire
from tg_tinker.server.tasks import whole
from tg_tinker.server.tickets import Held, Ticket
from tg_tinker.wire.tg import ENDED, FutureInfo

if TYPE_CHECKING:
    from tg_tinker.server.ownership import Ownership
    from tg_tinker.store.database import Database
    from tg_tinker.store.rows import FutureRow

_log = logging.getLogger("tg_tinker.server")
_RETRY = 5.0  # seconds until a write that failed is tried again
_BATCH = 500


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

    def __init__(self, database: Database, ownership: Ownership, *, kept: float) -> None:
        self._database = database
        self._ownership = ownership
        self._kept = kept
        self._dirty: dict[str, Ticket] = {}
        self._changed = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._closing = False
        self._known_tenants: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin writing."""
        self._task = asyncio.create_task(self._run(), name="journal")

    async def aclose(self) -> None:
        """Write what is left."""
        self._closing = True
        self._changed.set()
        if self._task is not None:
            await self._task

    def note(self, ticket: Ticket) -> None:
        """Write this ticket soon."""
        self._dirty[ticket.id] = ticket
        self._written.clear()
        self._changed.set()

    async def find(self, tenant: str, future_id: str) -> Stored | None:
        """A future by its id, or by the idempotency key of its request."""
        return await whole(self._find(tenant, future_id))

    async def _find(self, tenant: str, future_id: str) -> Stored | None:
        row = await self._database.get_future(tenant, future_id) or await self._database.find_future(tenant, future_id)
        if row is not None and not row.finished and self._ownership.is_dead(row.owner):
            await self._abandon(row.owner)
            row = await self._database.get_future(tenant, row.future_id)
        return None if row is None else Stored(row)

    async def list(self, tenant: str, *, run_id: str | None, status: str | None, limit: int) -> list[FutureInfo]:
        """A tenant's futures, newest first, of this process and of others."""
        await self.flush()
        rows = await self._database.list_futures(tenant, run_id=run_id, status=status, limit=limit)
        return [Stored(row).info() for row in rows]

    async def recover(self) -> None:
        """Fail what dead servers left unfinished."""
        for owner in await self._database.owners_of_unfinished():
            if self._ownership.is_dead(owner):
                await self._abandon(owner)

    async def flush(self) -> None:
        """Wait until everything noted so far is written."""
        await self._written.wait()

    async def _abandon(self, owner: str) -> None:
        error = ServerRestartedError("the server that held this operation ended before the operation did")
        await self._database.abandon_futures(owner, error.to_wire()["error"], datetime.now(UTC))

    async def _run(self) -> None:
        while not (self._closing and not self._dirty):
            await self._changed.wait()
            self._changed.clear()
            try:
                while self._dirty:
                    await self._write()
                self._written.set()
            # A full disk, a locked database: operations go on, and the write is tried again.
            except Exception:  # noqa: BLE001
                _log.exception("futures could not be written; trying again in %s s", _RETRY)
                if self._closing:
                    return
                await asyncio.sleep(_RETRY)
                self._changed.set()

    async def _write(self) -> None:
        batch = [self._dirty.pop(ticket_id) for ticket_id in list(self._dirty)[:_BATCH]]
        try:
            for tenant in {ticket.tenant for ticket in batch} - self._known_tenants:
                await self._database.add_tenant(tenant, datetime.now(UTC))
                self._known_tenants.add(tenant)
            await self._database.save_futures([await self._row(ticket) for ticket in batch])
        except BaseException:
            self._dirty = {ticket.id: ticket for ticket in batch} | self._dirty
            raise
        for ticket in batch:
            ticket.stored = ticket.stored or ticket.done

    async def _row(self, ticket: Ticket) -> FutureRow:
        from tg_tinker.store.rows import FutureRow

        info, error = ticket.info(), ticket.error()
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
            result=await ticket.body() if ticket.done and error is None else None,
            error=None if error is None else error.to_wire()["error"],
        )
