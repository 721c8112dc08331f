"""Runs that a home remembers and that the server of this command does not hold: what became of them, and what is left.

Reads the home's database and manifests; no key is needed, and no server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tg_tinker.store.index import ArtifactRecord
    from tg_tinker.store.rows import RunRow

__all__ = ["ELSEWHERE", "ENDED", "past_runs"]

ENDED, ELSEWHERE = "ended", "elsewhere"


def past_runs(place: Path, held: Container[str]) -> list[dict[str, Any]]:
    """The other runs of the home's own tenant, newest first, each with the newest state that was saved of it.

    Status "ended" is a run whose server is gone, "elsewhere" one that another server over the home holds now.
    """
    from tg_tinker.server.ownership import folder_of, has_ended
    from tg_tinker.server.settings import LOCAL_TENANT
    from tg_tinker.server.training.registry import DELETED

    states = _newest_states(place, LOCAL_TENANT)
    rows = asyncio.run(_rows(place, LOCAL_TENANT))
    return [
        _past(row, states.get(row.run_id), ended=has_ended(folder_of(place), str(row.state.get("owner"))))
        for row in rows
        if row.run_id not in held and row.status != DELETED
    ]


async def _rows(place: Path, tenant: str) -> list[RunRow]:
    from tg_tinker.store.database import Database, database_file
    from tg_tinker.store.sqlite import sqlite_url

    if not database_file(place).exists():
        return []
    database = await Database.open(sqlite_url(database_file(place)))
    try:
        return await database.list_runs(tenant, surface="tg")
    finally:
        await database.close()


def _newest_states(place: Path, tenant: str) -> dict[str, ArtifactRecord]:
    from tg_tinker.store.index import Index, record_of

    records = map(record_of, Index(place / "artifacts").manifests(tenant))
    return {record.run_id: record for record in sorted(records, key=lambda record: record.created_at)}


def _past(row: RunRow, state: ArtifactRecord | None, *, ended: bool) -> dict[str, Any]:
    return {
        "training_client_id": row.run_id,
        "tenant_id": row.tenant_id,
        "model_ref": row.model_ref,
        "status": ENDED if ended else ELSEWHERE,
        "step": None if state is None else state.step,
        "created_at": row.created_at.isoformat(),
        "config": row.config,
        "dp_metrics": None,
        "artifact_id": None if state is None else state.artifact_id,
    }
