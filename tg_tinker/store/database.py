"""The database: tenants, API keys, runs, futures. Small typed functions over SQLAlchemy's async core.

SQLite by default (``sqlite``), shared by several servers; a write transaction takes the write lock at its start, so
what it reads still holds when it writes. Another database needs that of ``writing`` in its own way: serializable
transactions, tried again. Audit entries go through ``audit``. Every look-up is by tenant: another's row is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from sqlalchemy import ColumnElement, Table, bindparam, delete, exc, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tg_tinker.errors import InvalidRequestError
from tg_tinker.store import sqlite, tables
from tg_tinker.store.names import check_label
from tg_tinker.store.rows import FINISHED, ApiKeyRow, FutureRow, RunRow

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy import Select

R = TypeVar("R", ApiKeyRow, RunRow, FutureRow)
_BATCH = 500  # rows of one statement


def database_file(home: Path) -> Path:
    """Where a home keeps its database."""
    return home / "tg-tinker.db"


def is_passing(error: Exception) -> bool:
    """Tell whether a write that failed may succeed later as it is: a lock, a full disk; not a fault of its rows."""
    if isinstance(error, exc.DBAPIError):
        faults = (exc.DataError, exc.IntegrityError, exc.NotSupportedError, exc.ProgrammingError)
        return not isinstance(error, faults)
    return isinstance(error, (OSError, MemoryError, exc.TimeoutError))


class Database:
    """One engine; used from the event loop that opened it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._writing = asyncio.Lock()

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect, and make the tables that are not there yet.

        Raises ``InvalidRequestError`` where that fails: it is no database of ours, or cannot be written to.
        """
        waiting = {"timeout": sqlite.BUSY_TIMEOUT} if sqlite.is_sqlite(url) else {}
        engine = create_async_engine(url, connect_args=waiting, hide_parameters=True)  # no results in error messages
        database = cls(engine)
        try:
            if sqlite.is_sqlite(url):
                await asyncio.to_thread(sqlite.prepare, url)
                sqlite.tune(engine)
            async with database.writing() as connection:
                await connection.run_sync(tables.metadata.create_all)
        except (exc.DatabaseError, sqlite3.DatabaseError, OSError) as error:
            await database.close()
            said = error.orig if isinstance(error, exc.DatabaseError) else error
            message = f"the database {engine.url.database} cannot be used: {said}"
            raise InvalidRequestError(message, field="database", constraint="a database to write to") from error
        except BaseException:  # cancelled, say: a connection must not be left to the collector
            await asyncio.shield(database.close())
            raise
        return database

    async def close(self) -> None:
        """Let go of every connection."""
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncGenerator[AsyncConnection]:
        """Give a connection with one consistent view."""
        async with self._engine.connect() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncGenerator[AsyncConnection]:
        """Give a transaction that holds the write lock; it is durable when the block ends."""
        engine = self._engine.execution_options(tg_write=True)
        async with self._writing, engine.begin() as connection:
            yield connection

    # tenants and keys

    async def add_tenant(self, tenant_id: str, at: datetime) -> bool:
        """Make a tenant known; tell whether it was new."""
        check_label(tenant_id, "tenant_id")
        async with self.writing() as connection:
            known = await connection.execute(select(tables.tenants).where(tables.tenants.c.tenant_id == tenant_id))
            if known.first() is not None:
                return False
            await connection.execute(insert(tables.tenants).values(tenant_id=tenant_id, created_at=at))
        return True

    async def add_api_key(self, row: ApiKeyRow) -> None:
        """Store a new key of a known tenant."""
        await self._insert(tables.api_keys, row)

    async def get_api_key(self, key_id: str) -> ApiKeyRow | None:
        """Look a key up by its public id."""
        return await self._first(ApiKeyRow, select(tables.api_keys).where(tables.api_keys.c.key_id == key_id))

    async def list_api_keys(self, tenant_id: str | None = None) -> list[ApiKeyRow]:
        """Keys of one tenant, or of all, oldest first."""
        query = select(tables.api_keys).order_by(tables.api_keys.c.created_at)
        if tenant_id is not None:
            query = query.where(tables.api_keys.c.tenant_id == tenant_id)
        return await self._all(ApiKeyRow, query)

    async def revoke_api_key(self, key_id: str, at: datetime) -> bool:
        """Make a key useless from now on; tell whether it was usable until now."""
        column = tables.api_keys.c
        unrevoked = (column.key_id == key_id) & column.revoked_at.is_(None)
        return await self._change(tables.api_keys, unrevoked, revoked_at=at) > 0

    # runs

    async def add_run(self, row: RunRow) -> None:
        """Store a new run of a known tenant."""
        await self._insert(tables.runs, row)

    async def get_run(self, tenant_id: str, run_id: str) -> RunRow | None:
        """Look a run of this tenant up."""
        return await self._first(RunRow, select(tables.runs).where(_own(tables.runs, tenant_id, run_id=run_id)))

    async def list_runs(self, tenant_id: str, *, surface: str) -> list[RunRow]:
        """Runs of a tenant, on one surface, newest first."""
        query = select(tables.runs).where(_own(tables.runs, tenant_id, surface=surface))
        return await self._all(RunRow, query.order_by(tables.runs.c.created_at.desc(), tables.runs.c.run_id))

    async def update_run(self, tenant_id: str, run_id: str, **changes: Any) -> bool:
        """Change columns of a run; tell whether it exists."""
        return await self._change(tables.runs, _own(tables.runs, tenant_id, run_id=run_id), **changes) > 0

    # futures

    async def save_futures(self, rows: Sequence[FutureRow]) -> None:
        """Store accepted or changed futures, all or none; a hundred cost hardly more than one.

        Of several rows of one future the last one counts. An idempotency key that is used again, once the server forgot
        its first use, is the newer future's from then on.
        """
        column = tables.futures.c
        latest = {row.future_id: attrs.asdict(row, recurse=False) for row in rows}
        async with self.writing() as connection:
            known = await _insert_new(connection, latest)
            changed = [
                {**_without_key(fields), "at_id": future_id, "at_tenant": fields["tenant_id"]}
                for future_id, fields in latest.items()
                if future_id in known
            ]
            if changed:
                columns: dict[str, Any] = {name: bindparam(name) for name in _without_key(next(iter(latest.values())))}
                where = (column.future_id == bindparam("at_id")) & (column.tenant_id == bindparam("at_tenant"))
                await connection.execute(update(tables.futures).where(where).values(columns), changed)

    async def add_futures(self, rows: Sequence[FutureRow]) -> None:
        """Store those futures that are not known yet, and their tenants; the others stay as they are."""
        for row in {row.tenant_id: row for row in rows}.values():
            await self.add_tenant(row.tenant_id, row.created_at)
        async with self.writing() as connection:
            for start in range(0, len(rows), _BATCH):
                some = rows[start : start + _BATCH]
                await _insert_new(connection, {row.future_id: attrs.asdict(row, recurse=False) for row in some})

    async def get_future(self, tenant_id: str, future_id: str) -> FutureRow | None:
        """Look a future of this tenant up."""
        where = _own(tables.futures, tenant_id, future_id=future_id)
        return await self._first(FutureRow, select(tables.futures).where(where))

    async def find_future(self, tenant_id: str, idempotency_key: str) -> FutureRow | None:
        """Look a future up by the key its request carried: a retry is answered with what the first try began."""
        where = _own(tables.futures, tenant_id, idempotency_key=idempotency_key)
        return await self._first(FutureRow, select(tables.futures).where(where))

    async def list_futures(
        self, tenant_id: str, *, run_id: str | None = None, status: str | None = None, limit: int = 100
    ) -> list[FutureRow]:
        """Futures of a tenant, newest first."""
        column = tables.futures.c
        query = select(tables.futures).where(column.tenant_id == tenant_id)
        for name, value in (("run_id", run_id), ("status", status)):
            if value is not None:
                query = query.where(column[name] == value)
        return await self._all(FutureRow, query.order_by(column.created_at.desc(), column.future_id).limit(limit))

    async def owners_of_unfinished(self) -> list[str]:
        """Server processes that accepted work which has not ended."""
        column = tables.futures.c
        async with self.reading() as connection:
            query = select(column.owner).where(column.status.not_in(FINISHED)).distinct().order_by(column.owner)
            return [str(row[0]) for row in await connection.execute(query)]

    async def abandon_futures(
        self, owner: str, error: dict[str, Any], at: datetime, expires_at: datetime | None = None
    ) -> int:
        """Fail whatever a dead server process left unfinished, and count it."""
        where = (tables.futures.c.owner == owner) & tables.futures.c.status.not_in(FINISHED)
        ended = {"status": "failed", "error": error, "completed_at": at, "expires_at": expires_at}
        return await self._change(tables.futures, where, **ended)

    async def unaudited_futures(self, owner: str, limit: int) -> list[FutureRow]:
        """Finished futures of a server process whose end is not in the audit log, oldest first, without results."""
        column, entry = tables.futures.c, tables.audit.c
        told = (entry.tenant_id == column.tenant_id) & (entry.operation_id == column.future_id)
        audited = select(entry.sequence).where(told & (entry.event == "ended")).exists()
        query = select(*(one for one in column if one is not column.result))
        where = column.status.in_(FINISHED) & (column.owner == owner) & ~audited
        return await self._all(FutureRow, query.where(where).order_by(column.created_at).limit(limit))

    async def sweep_futures(self, now: datetime) -> int:
        """Forget finished futures that were kept long enough, and count them."""
        column = tables.futures.c
        async with self.writing() as connection:
            where = column.status.in_(FINISHED) & (column.expires_at <= now)
            return (await connection.execute(delete(tables.futures).where(where))).rowcount

    # the few statements everything above is made of

    async def _insert(self, table: Table, row: ApiKeyRow | RunRow) -> None:
        async with self.writing() as connection:
            await connection.execute(insert(table).values(attrs.asdict(row, recurse=False)))

    async def _change(self, table: Table, where: ColumnElement[bool], **changes: Any) -> int:
        async with self.writing() as connection:
            return (await connection.execute(update(table).where(where).values(changes))).rowcount

    async def _first(self, kind: type[R], query: Select[Any]) -> R | None:
        found = await self._all(kind, query.limit(1))
        return found[0] if found else None

    async def _all(self, kind: type[R], query: Select[Any]) -> list[R]:
        async with self.reading() as connection:
            return [kind(**row) for row in (await connection.execute(query)).mappings()]


async def _insert_new(connection: AsyncConnection, latest: dict[str, dict[str, Any]]) -> set[str]:
    """Insert the futures that are not there yet; gives the ids of those that are."""
    column = tables.futures.c
    found = await connection.execute(select(column.future_id).where(column.future_id.in_(latest)))
    known = {str(row[0]) for row in found}
    new = [fields for future_id, fields in latest.items() if future_id not in known]
    if new:
        await _release_keys(connection, new)
        await connection.execute(insert(tables.futures), new)
    return known


async def _release_keys(connection: AsyncConnection, new: Sequence[dict[str, Any]]) -> None:
    """Take the idempotency keys of these futures away from whatever had them before: a tenant's key names one."""
    keyed = {(fields["tenant_id"], fields["idempotency_key"]): fields["future_id"] for fields in new}
    for fields in new:
        if keyed[fields["tenant_id"], fields["idempotency_key"]] != fields["future_id"]:
            fields["idempotency_key"] = None
    taken = [{"at_tenant": tenant, "at_key": key} for tenant, key in keyed if key is not None]
    if taken:
        column = tables.futures.c
        where = (column.tenant_id == bindparam("at_tenant")) & (column.idempotency_key == bindparam("at_key"))
        await connection.execute(update(tables.futures).where(where).values(idempotency_key=None), taken)


def _without_key(fields: dict[str, Any]) -> dict[str, Any]:
    """Give the columns that an update writes: the idempotency key may belong to a newer future by now."""
    return {name: value for name, value in fields.items() if name != "idempotency_key"}


def _own(table: Table, tenant_id: str, **keys: str) -> ColumnElement[bool]:
    where: ColumnElement[bool] = table.c.tenant_id == tenant_id
    for name, value in keys.items():
        where = where & (table.c[name] == value)
    return where
