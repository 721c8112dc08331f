from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import attrs
import pytest
import sqlalchemy.exc
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from tg_tinker.errors import InvalidRequestError
from tg_tinker.store.audit import AuditEvent, AuditLog, HeadSigner
from tg_tinker.store.database import Database, is_passing
from tg_tinker.store.rows import ApiKeyRow, FutureRow, RunRow
from tg_tinker.store.sqlite import sqlite_url

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """Open a fresh database that knows two tenants."""
    database = await Database.open(sqlite_url(tmp_path / "test.db"))
    await database.add_tenant("acme", NOW)
    await database.add_tenant("other", NOW)
    yield database
    await database.close()


def run(run_id: str = "run-1", **changes: Any) -> RunRow:
    """Make a run."""
    fields: dict[str, Any] = {
        "tenant_id": "acme",
        "surface": "tg",
        "model_ref": "tg-tinker/tiny",
        "status": "active",
        "step": 0,
        "config": {"rank": 4, "none": None},
        "created_at": NOW,
        "updated_at": NOW,
    }
    return RunRow(run_id=run_id, **{**fields, **changes})


def future(future_id: str = "fut-1", **changes: Any) -> FutureRow:
    """Make a future."""
    fields: dict[str, Any] = {
        "tenant_id": "acme",
        "run_id": "run-1",
        "operation": "optim_step",
        "status": "pending",
        "owner": "server-1",
        "created_at": NOW,
    }
    return FutureRow(future_id=future_id, **{**fields, **changes})


async def test_tenants_are_known_once(database: Database) -> None:
    """Adding a tenant again changes nothing; a name that is no label is refused."""
    assert not await database.add_tenant("acme", LATER)
    with pytest.raises(InvalidRequestError):
        await database.add_tenant("../acme", NOW)


async def test_api_keys_are_found_listed_and_revoked(database: Database) -> None:
    """A key is looked up by id, usable until it is revoked or expires, and revoked once."""
    key = ApiKeyRow(
        key_id="k1", tenant_id="acme", secret_hash="0123abcd", name="laptop", created_at=NOW, expires_at=LATER
    )
    await database.add_api_key(key)
    assert await database.get_api_key("k1") == key
    assert await database.get_api_key("k2") is None
    assert key.usable(NOW)
    assert not key.usable(LATER)
    assert await database.revoke_api_key("k1", NOW)
    assert not await database.revoke_api_key("k1", LATER)
    revoked = await database.get_api_key("k1")
    assert revoked == attrs.evolve(key, revoked_at=NOW)
    assert revoked is not None
    assert not revoked.usable(NOW)
    assert await database.list_api_keys("other") == []
    assert await database.list_api_keys() == [revoked]
    assert "0123abcd" not in repr(revoked)


async def test_a_key_needs_a_known_tenant(database: Database) -> None:
    """The database refuses a key of a tenant that does not exist."""
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        await database.add_api_key(
            ApiKeyRow(key_id="k", tenant_id="nobody", secret_hash="h", name=None, created_at=NOW)
        )


async def test_a_key_that_is_used_again_is_the_newer_futures(database: Database) -> None:
    """A repeated idempotency key stops no write: it finds the newest future, also after the older one changes."""
    await database.save_futures(
        [future(idempotency_key="key-1"), future("other", tenant_id="other", idempotency_key="key-1")]
    )
    await database.save_futures([future("fut-2", idempotency_key="key-1"), future("fut-3", idempotency_key="key-1")])
    await database.save_futures([future(idempotency_key="key-1", status="completed")])
    found = [await database.find_future(tenant, "key-1") for tenant in ("acme", "other")]
    assert [row and row.future_id for row in found] == ["fut-3", "other"]
    assert await database.get_future("acme", "fut-1") == future(status="completed")
    assert await database.get_future("acme", "fut-2") == future("fut-2")


async def test_runs_are_their_tenants_own(database: Database) -> None:
    """Another tenant neither sees nor changes a run."""
    await database.add_run(run())
    assert await database.get_run("acme", "run-1") == run()
    assert await database.get_run("other", "run-1") is None
    assert not await database.update_run("other", "run-1", step=9)
    assert await database.get_run("acme", "run-1") == run()


async def test_a_run_changes(database: Database) -> None:
    """Updating changes the named columns alone."""
    await database.add_run(run())
    assert await database.update_run("acme", "run-1", step=5, status="completed", state={"policy_version": 5})
    changed = await database.get_run("acme", "run-1")
    assert changed == run(step=5, status="completed", state={"policy_version": 5})


async def test_a_future_lives_through_its_states(database: Database) -> None:
    """Saving a future again replaces it; result bytes and error bodies come back exactly."""
    await database.save_futures([future(idempotency_key="key-1")])
    assert await database.find_future("acme", "key-1") == future(idempotency_key="key-1")
    assert await database.find_future("other", "key-1") is None
    done = future(idempotency_key="key-1", status="completed", completed_at=LATER, result=b'{"loss":1.5}\x00')
    await database.save_futures([done])
    assert await database.get_future("acme", "fut-1") == done
    assert await database.get_future("other", "fut-1") is None
    assert done.finished
    assert not future().finished


async def test_the_last_row_of_a_future_counts(database: Database) -> None:
    """Accepted, started and ended in one batch, a future is stored as it ended; nothing at all is fine too."""
    rows = [future(), future(status="running"), future("fut-2"), future(status="completed", result=b"1")]
    await database.save_futures(rows)
    assert await database.get_future("acme", "fut-1") == rows[3]
    await database.save_futures([future("fut-2", status="failed"), future("fut-3")])
    assert [row.status for row in await database.list_futures("acme")] == ["completed", "failed", "pending"]
    await database.save_futures([])


async def test_a_future_never_changes_its_tenant(database: Database) -> None:
    """A row that claims another tenant's future id changes nothing of it."""
    await database.save_futures([future()])
    await database.save_futures([future(tenant_id="other", status="failed")])
    assert await database.get_future("acme", "fut-1") == future()
    assert await database.get_future("other", "fut-1") is None


async def test_futures_are_filtered(database: Database) -> None:
    """Lists take a run and a status, and begin with the newest."""
    rows = [
        future("fut-1"),
        future("fut-2", status="failed", error={"code": "X"}, created_at=LATER),
        future("fut-3", run_id=None),
    ]
    await database.save_futures(rows)
    assert [row.future_id for row in await database.list_futures("acme")] == ["fut-2", "fut-1", "fut-3"]
    assert [row.future_id for row in await database.list_futures("acme", run_id="run-1")] == ["fut-2", "fut-1"]
    assert await database.list_futures("acme", status="failed") == [rows[1]]
    assert len(await database.list_futures("acme", limit=1)) == 1


async def test_saving_futures_is_all_or_nothing(database: Database) -> None:
    """When one of several cannot be stored, none is."""
    await database.save_futures([future()])
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        await database.save_futures([future("fut-2"), future("fut-3", tenant_id="nobody")])
    assert await database.get_future("acme", "fut-2") is None


async def test_the_work_of_a_dead_server_is_failed(database: Database) -> None:
    """Unfinished futures of one owner fail with the given error; finished ones and other owners' are untouched."""
    rows = [future("fut-1"), future("fut-2", status="completed"), future("fut-3", owner="server-2", status="running")]
    await database.save_futures(rows)
    assert await database.owners_of_unfinished() == ["server-1", "server-2"]
    assert await database.abandon_futures("server-1", {"code": "SERVER_RESTARTED"}, NOW, LATER) == 1
    ended = {"status": "failed", "error": {"code": "SERVER_RESTARTED"}, "completed_at": NOW, "expires_at": LATER}
    failed = attrs.evolve(rows[0], **ended)
    assert await database.get_future("acme", "fut-1") == failed
    assert await database.get_future("acme", "fut-2") == rows[1]
    assert await database.owners_of_unfinished() == ["server-2"]


async def test_futures_whose_end_the_audit_log_lacks_are_found(database: Database, tmp_path: Path) -> None:
    """One server's finished futures without an entry of their end are listed, oldest first; an "accepted" is no end."""
    await database.save_futures(
        [
            future("fut-1", status="completed", created_at=LATER, result=b"{}"),
            future("fut-2", status="failed"),
            future("fut-3", status="completed"),
            future("fut-4", status="running"),
            future("fut-5", status="completed", owner="server-2"),
        ]
    )
    log = AuditLog(database, HeadSigner(tmp_path / "audit.key"))
    written = (("fut-2", "acme", "accepted"), ("fut-1", "other", "ended"), ("fut-3", "acme", "ended"))
    for future_id, tenant, kind in written:
        happened = {"tenant_id": tenant, "operation": "optim_step", "operation_id": future_id, "event": kind}
        await log.append(AuditEvent(**happened))
    found = await database.unaudited_futures("server-1", 10)
    assert [(row.future_id, row.result) for row in found] == [("fut-2", None), ("fut-1", None)]
    assert [row.future_id for row in await database.unaudited_futures("server-1", 1)] == ["fut-2"]


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (sqlite3.OperationalError("database is locked"), True),
        (sqlite3.OperationalError("database or disk is full"), True),
        (sqlite3.DatabaseError("file is not a database"), True),
        (sqlite3.DataError("string or blob too big"), False),
        (sqlite3.IntegrityError("FOREIGN KEY constraint failed"), False),
        (sqlite3.ProgrammingError("type 'object' is not supported"), False),
    ],
)
def test_a_lock_passes_and_a_bad_row_does_not(error: sqlite3.Error, passing: bool) -> None:
    """What the database itself suffers from may pass; what is wrong with a row stays wrong."""
    wrapped = sqlalchemy.exc.DBAPIError.instance("INSERT", {}, error, sqlite3.Error, dialect=sqlite.dialect())
    assert isinstance(wrapped, sqlalchemy.exc.DBAPIError)
    assert is_passing(wrapped) is passing


async def test_what_is_wrong_with_a_real_row_does_not_pass(database: Database) -> None:
    """A tenant that is not known, JSON that is none, and text that is no Unicode are faults of the row."""
    for changes in ({"tenant_id": "nobody"}, {"error": {"x": object()}}, {"run_id": "\udcff"}, {"run_id": object()}):
        with pytest.raises(Exception) as caught:
            await database.save_futures([future(**changes)])
        assert not is_passing(caught.value), caught.value
        assert await database.list_futures("acme") == []


async def test_errors_of_the_database_show_no_rows(database: Database) -> None:
    """What is stored does not leak into logs through an exception's text."""
    with pytest.raises(sqlalchemy.exc.IntegrityError) as caught:
        await database.save_futures([future(tenant_id="nobody", result=b"secret", error={"message": "secret"})])
    assert "secret" not in str(caught.value)


async def test_old_results_are_swept(database: Database) -> None:
    """Finished futures go when their time is over; unfinished ones and those without an end stay."""
    await database.save_futures(
        [
            future("fut-1", status="completed", expires_at=NOW),
            future("fut-2", status="completed", expires_at=LATER),
            future("fut-3", status="pending", expires_at=NOW),
            future("fut-4", status="completed"),
        ]
    )
    assert await database.sweep_futures(NOW) == 1
    assert await database.get_future("acme", "fut-1") is None
    assert len(await database.list_futures("acme")) == 3


async def test_times_are_utc(database: Database) -> None:
    """A time given in another zone comes back as the same moment in UTC."""
    there = timezone(timedelta(hours=5))
    await database.add_run(run(created_at=NOW.astimezone(there)))
    found = await database.get_run("acme", "run-1")
    assert found is not None
    assert found.created_at == NOW
    assert found.created_at.tzinfo is UTC


def open_to_others(folder: Path) -> list[str]:
    """Name the files that other users may read or write."""
    return [path.name for path in folder.iterdir() if path.stat().st_mode & 0o077]


async def test_its_file_is_private(tmp_path: Path) -> None:
    """Other users of the machine can read neither the database nor what it writes beside it."""
    database = await Database.open(sqlite_url(tmp_path / "test.db"))
    await database.add_tenant("acme", NOW)
    assert open_to_others(tmp_path) == []
    await database.close()


async def test_rows_survive_reopening(tmp_path: Path) -> None:
    """A database opened again holds what was stored, in WAL mode."""
    url = sqlite_url(tmp_path / "test.db")
    first = await Database.open(url)
    await first.add_tenant("acme", NOW)
    await first.add_run(run())
    await first.close()
    second = await Database.open(url)
    assert await second.get_run("acme", "run-1") == run()
    async with second.reading() as connection:
        assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar() == "wal"
        assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar() == 2
    await second.close()


async def test_two_servers_write_at_once(tmp_path: Path) -> None:
    """Two databases over one file, each with many writers, lose no row and meet no lock error."""
    url = sqlite_url(tmp_path / "test.db")
    both = await asyncio.gather(Database.open(url), Database.open(url))
    await both[0].add_tenant("acme", NOW)
    writes = [both[n % 2].save_futures([future(f"fut-{n}")]) for n in range(40)]
    await asyncio.gather(*writes)
    assert len(await both[0].list_futures("acme")) == 40
    for database in both:
        await database.close()


async def test_opening_that_is_given_up_leaves_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is cancelled while opening has let go of everything; a place that is no file to write is refused."""
    closed, close, made = asyncio.Event(), Database.close, asyncio.Event()

    async def closing(self: Database) -> None:
        await close(self)
        closed.set()

    async def held(*_: object) -> None:
        made.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(Database, "close", closing)
    monkeypatch.setattr(AsyncConnection, "run_sync", held)
    opening = asyncio.create_task(Database.open(sqlite_url(tmp_path / "test.db")))
    async with asyncio.timeout(30):
        await made.wait()
        opening.cancel()
        await closed.wait()
    with pytest.raises(asyncio.CancelledError):
        await opening
    monkeypatch.undo()
    with pytest.raises(InvalidRequestError, match="cannot be used"):
        await Database.open(sqlite_url(tmp_path / "nowhere" / "test.db"))


async def test_a_home_that_another_server_opens_just_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another writes to a new file, its mode cannot change, and SQLite does not wait: opening does."""
    file, refused = tmp_path / "test.db", threading.Event()
    monkeypatch.setattr("tg_tinker.store.sqlite.sleep", lambda _: refused.set())
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    opening = asyncio.create_task(Database.open(sqlite_url(file)))
    assert await asyncio.to_thread(refused.wait, 20)
    other.execute("COMMIT")
    await (await opening).close()
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
