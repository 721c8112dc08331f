"""Which runs there ever were, in the database: so that one which ended with its server is not just "not found"."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tg_tinker.errors import ServerRestartedError
from tg_tinker.server.ownership import Ownership
from tg_tinker.server.training.runs import Run

if TYPE_CHECKING:
    from tg_tinker.store.database import Database
    from tg_tinker.store.rows import RunRow

DELETED = "deleted"


class Registry:
    """Records runs; the runs themselves live in memory."""

    def __init__(self, database: Database, ownership: Ownership) -> None:
        self._database = database
        self._ownership = ownership

    async def record(self, run: Run) -> None:
        """Write a new run down."""
        from tg_tinker.store.rows import RunRow

        await self._database.add_tenant(run.tenant, run.created_at)
        row = RunRow(
            run_id=run.id,
            tenant_id=run.tenant,
            surface=run.surface,
            model_ref=run.model.ref,
            status=run.status,
            step=run.step,
            config=run.config,
            created_at=run.created_at,
            updated_at=run.created_at,
            state={"owner": self._ownership.name},
        )
        await self._database.add_run(row)

    async def delete(self, run: Run) -> None:
        """Note that a run was deleted."""
        await self._database.update_run(run.tenant, run.id, status=DELETED, updated_at=datetime.now(UTC))

    async def explain(self, tenant: str, run_id: str) -> None:
        """Raise ``ServerRestartedError`` for a run that ended with its server; do nothing for any other."""
        row = await self._database.get_run(tenant, run_id)
        if row is None or row.status == DELETED or not self._is_left_behind(row):
            return
        message = f"{run_id} ended with the server that held it; make a new one from its last saved state"
        raise ServerRestartedError(message)

    async def has_ended(self, tenant: str, run_id: str) -> bool:
        """Whether no server holds this run any more."""
        row = await self._database.get_run(tenant, run_id)
        return row is None or row.status == DELETED or self._is_left_behind(row)

    def _is_left_behind(self, row: RunRow) -> bool:
        return self._ownership.is_dead(str(row.state.get("owner")))
