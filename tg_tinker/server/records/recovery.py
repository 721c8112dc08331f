"""What servers that died left behind: their unfinished futures fail, and what the audit log lacks is added.

Several servers may do so at the same time: a future fails once, and an event has one entry whoever writes it.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import attrs

from tg_tinker.errors import ServerRestartedError
from tg_tinker.server.records import trail
from tg_tinker.server.records.auditing import failure
from tg_tinker.wire.errors import from_wire

if TYPE_CHECKING:
    from pathlib import Path

    from tg_tinker.server.ownership import Ownership
    from tg_tinker.store.audit import AuditEvent, AuditLog
    from tg_tinker.store.database import Database
    from tg_tinker.store.rows import FutureRow

_BATCH = 500  # futures whose entries are written in one transaction


class Recovery:
    """Puts the records of dead server processes in order; ``folder`` is where their trails are."""

    def __init__(self, database: Database, log: AuditLog, ownership: Ownership, folder: Path, *, kept: float) -> None:
        self._database = database
        self._log = log
        self._ownership = ownership
        self._folder = folder
        self._kept = kept

    async def after_all(self) -> None:
        """Look for every server that died, and do it for each."""
        for owner in trail.owners(self._folder).union(await self._database.owners_of_unfinished()):
            if self._ownership.is_dead(owner):
                await self.after(owner)

    async def after(self, owner: str) -> None:
        """Fail what this dead server left unfinished, and complete its audit entries; then delete its trail."""
        steps = await asyncio.to_thread(trail.read, self._folder, owner)
        await self._database.add_futures([_accepted(owner, *step) for step in steps if step[0].event == "accepted"])
        error = ServerRestartedError("the server that held this operation ended before the outcome was recorded")
        now = datetime.now(UTC)
        kept_until = now + timedelta(seconds=self._kept)
        await self._database.abandon_futures(owner, error.to_wire()["error"], now, kept_until)
        await self._complete_log(owner, [event for event, _ in steps])
        await asyncio.to_thread(trail.forget, self._folder, owner)

    async def _complete_log(self, owner: str, events: list[AuditEvent]) -> None:
        """Write what the trail tells, then of what it does not tell the end; what is in the log stays as it is."""
        for start in range(0, len(events), _BATCH):
            await self._log.append_all(events[start : start + _BATCH])
        while rows := await self._database.unaudited_futures(owner, _BATCH):
            await self._log.append_all([event for row in rows for event in _events(row)])


def _accepted(owner: str, event: AuditEvent, key: str | None) -> FutureRow:
    """The row of a future as it was when it was accepted."""
    from tg_tinker.store.rows import FutureRow

    return FutureRow(
        future_id=event.operation_id,
        tenant_id=event.tenant_id,
        run_id=event.training_client_id,
        operation=event.operation,
        status="pending",
        owner=owner,
        created_at=event.timestamp,
        idempotency_key=key,
    )


def _events(row: FutureRow) -> list[AuditEvent]:
    """The events of a finished future, as far as the journal knows them."""
    from tg_tinker.store.audit import AuditEvent

    accepted = AuditEvent(
        tenant_id=row.tenant_id,
        operation=row.operation,
        operation_id=row.future_id,
        event="accepted",
        training_client_id=row.run_id,
        timestamp=row.created_at,
    )
    error = None if row.error is None else from_wire(row.error)
    ended = row.completed_at or row.created_at
    outcome = attrs.evolve(
        accepted,
        event="ended",
        timestamp=ended,
        success=error is None,
        **failure(error),
        duration_ms=(ended - row.created_at).total_seconds() * 1e3,
    )
    return [accepted, outcome]
