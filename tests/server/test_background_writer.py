from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from tg_tinker.errors import ServerError
from tg_tinker.server.records import background_writer
from tg_tinker.server.records.background_writer import BackgroundWriter

LOCKED = OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked"))


class Table:
    """Takes batches whole or not at all; "bad" rows never, and nothing while ``trouble`` is set."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.batches = 0
        self.given_up: list[str] = []
        self.trouble: Exception | None = None
        self.turns = asyncio.Semaphore(1000)  # one for each batch

    async def write(self, rows: list[str]) -> None:
        """Take a batch."""
        self.batches += 1
        await self.turns.acquire()
        if self.trouble is not None:
            raise self.trouble
        if any(row.startswith("bad") for row in rows):
            raise ValueError("a row that cannot be encoded")
        self.rows += rows

    async def give_up(self, row: str, error: Exception) -> None:
        """Take a word about a row instead of the row."""
        assert isinstance(error, ValueError)
        if row == "bad beyond words":
            raise error
        self.given_up.append(row)


@pytest.fixture
def table() -> Table:
    """An empty table."""
    return Table()


@pytest.fixture
async def writer(table: Table, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BackgroundWriter[str]]:
    """A writer into it that tries again soon."""
    monkeypatch.setattr(background_writer, "_RETRY", 0.01)
    writer = BackgroundWriter("the test", table.write, table.give_up)
    writer.start()
    yield writer
    await writer.aclose()


def put(writer: BackgroundWriter[str], *rows: str) -> None:
    """Put rows under keys of their own."""
    for row in rows:
        writer.put(row, row)


async def test_rows_are_written_in_order_many_at_a_time(writer, table):
    """Rows arrive in the order they were put, those that waited together in one batch."""
    put(writer, *(str(number) for number in range(800)))
    await writer.flush()
    assert table.rows == [str(number) for number in range(800)]
    assert table.batches == 2


async def test_a_row_put_again_takes_the_place_of_the_first(writer, table):
    """Only the newest content of a key is written; one that comes during the write is written after it."""
    for content in ("a", "b"):
        writer.put("key", content)
    table.turns = asyncio.Semaphore(0)
    while not table.batches:
        await asyncio.sleep(0)
    writer.put("key", "c")
    for _ in range(2):
        table.turns.release()
    await writer.flush()
    assert table.rows == ["b", "c"]


async def test_an_unwritable_row_holds_up_nobody(writer, table, caplog):
    """The rows around it are written in order; it is given up loudly, once, though nothing can stand in for it."""
    put(writer, "1", "bad", "2", "bad beyond words", "3")
    await writer.flush()
    assert table.rows == ["1", "2", "3"]
    assert table.given_up == ["bad"]
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.ERROR, logging.ERROR, logging.CRITICAL]


@pytest.mark.parametrize("trouble", [LOCKED, OSError("no space left"), MemoryError()])
async def test_what_failed_for_a_passing_reason_is_kept(writer, table, trouble):
    """While the database is locked or the disk full, every row waits, in order, and none is given up."""
    table.trouble = trouble
    put(writer, "1", "bad", "2")
    while table.batches < 3:
        await asyncio.sleep(0.001)
    put(writer, "3")
    table.trouble = None
    await writer.flush()
    assert (table.rows, table.given_up) == (["1", "2", "3"], ["bad"])


async def test_a_flush_has_a_deadline(writer, table, monkeypatch):
    """Whoever waits for a database that stays locked is told so by a typed error; the rows are not lost by it."""
    table.trouble = LOCKED
    monkeypatch.setattr(writer, "_patience", 0.05)
    put(writer, "1")
    with pytest.raises(ServerError, match=r"the test could not be written within 0\.05 s") as caught:
        await writer.flush()
    assert caught.value.code == "RECORDS_NOT_WRITTEN"
    monkeypatch.setattr(writer, "_patience", 20.0)
    table.trouble = None
    await writer.flush()
    assert table.rows == ["1"]


async def test_a_flush_waits_for_what_came_before_it_alone(writer, table):
    """Rows that are put while somebody waits do not make the wait longer."""
    table.turns = asyncio.Semaphore(0)
    put(writer, "1")
    waiting = asyncio.create_task(writer.flush())
    while not table.batches:
        await asyncio.sleep(0)
    put(writer, "2")
    table.turns.release()
    async with asyncio.timeout(30):
        await waiting
    assert table.rows == ["1"]
    table.turns.release()


async def test_closing_writes_what_is_left(table):
    """The end waits for no linger, and says that nothing was lost."""
    writer: BackgroundWriter[Any] = BackgroundWriter("the test", table.write, table.give_up, linger=600.0)
    writer.start()
    put(writer, "1")
    assert await writer.aclose()
    assert table.rows == ["1"]


async def test_what_is_lost_at_the_end_is_said(table, caplog):
    """A server that ends while its database is locked says how many rows it lost, and ends."""
    table.trouble = LOCKED
    writer: BackgroundWriter[Any] = BackgroundWriter("the test", table.write, table.give_up)
    writer.start()
    put(writer, "1", "2")
    assert not await writer.aclose()
    assert caplog.records[-1].levelno == logging.CRITICAL
    assert "2 rows were not written" in caplog.records[-1].getMessage()
