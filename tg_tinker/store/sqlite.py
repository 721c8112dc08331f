"""What is SQLite's own about the database: one private file in WAL mode, and transactions that lock when they begin."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, make_url

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

BUSY_TIMEOUT = 30.0  # seconds another process may hold the write lock
_PAUSE = 0.005  # seconds between two tries to change the journal's mode


def sqlite_url(path: Path) -> str:
    """Name an SQLite file as a database URL."""
    return f"sqlite+aiosqlite:///{path}"


def is_sqlite(url: str) -> bool:
    """Tell whether a database URL names an SQLite file."""
    return url.startswith("sqlite")


def prepare(url: str) -> None:
    """Make the file, for its owner alone, and put it into WAL mode, where it stays. Blocks.

    The file is made before SQLite would: what that makes, and puts beside it, is as open as this. Raises
    ``sqlite3.DatabaseError``.
    """
    file = make_url(url).database
    if file is None or file in {"", ":memory:"}:
        return
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    with contextlib.closing(sqlite3.connect(file, timeout=BUSY_TIMEOUT)) as connection:
        _write_ahead(connection)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Change the journal's mode; where two do so at once, SQLite refuses one of them without any waiting."""
    deadline = monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or monotonic() > deadline:
                raise
            sleep(_PAUSE)
        else:
            return


def tune(engine: AsyncEngine) -> None:
    """Set full syncing, and begin transactions ourselves: the driver would take the write lock too late."""

    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def begun(connection: Connection) -> None:
        write = connection.get_execution_options().get("tg_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    event.listen(engine.sync_engine, "connect", connected)
    event.listen(engine.sync_engine, "begin", begun)
