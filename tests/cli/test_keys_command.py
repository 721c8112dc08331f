"""`tg-tinker keys`: what is made here opens the server of this home, until it is revoked."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tg_tinker.cli import main
from tg_tinker.errors import AuthenticationError
from tg_tinker.server.auth import Keys
from tg_tinker.server.settings import Settings
from tg_tinker.store.database import Database, database_file
from tg_tinker.store.sqlite import sqlite_url


def keys(home: Path, *arguments: str, code: int = 0) -> Result:
    """Run one command on ``home``."""
    result = CliRunner().invoke(main, ["keys", *arguments, "--home", str(home)])
    assert result.exit_code == code, result.output
    return result


def listed(home: Path) -> list[dict[str, object]]:
    """Every key as JSON."""
    rows: list[dict[str, object]] = json.loads(keys(home, "ls", "--format", "json").stdout)
    return rows


async def tenant_of(home: Path, key: str) -> str:
    """Ask a server over ``home``, just started, whose key it is; it would listen on any address now."""
    database = await Database.open(sqlite_url(database_file(home)))
    try:
        settings = Settings(home=home, host="0.0.0.0")
        doors = Keys(settings, database)
        settings.check_address(has_keys=await doors.usable())
        return await doors.tenant_of(f"Bearer {key}")
    finally:
        await database.close()


def test_a_key_is_shown_once(tmp_path: Path) -> None:
    """`create` prints the key alone on standard output; no listing and no file of the home holds it."""
    key = keys(tmp_path, "create", "acme", "--name", "laptop").stdout.strip()
    secret = key.split("_", 2)[2]
    (row,) = listed(tmp_path)
    assert (row["tenant_id"], row["name"], row["state"], row["expires_at"]) == ("acme", "laptop", "usable", None)
    assert row["key_id"] == key.split("_")[1]
    assert "laptop" in keys(tmp_path, "ls").stdout
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.iterdir())


async def test_a_key_opens_the_server_until_it_is_revoked(tmp_path: Path) -> None:
    """A server over the home takes the key for its tenant, may serve other machines, and refuses a revoked one."""
    first, second = [(await asyncio.to_thread(keys, tmp_path, "create", "acme")).stdout.strip() for _ in range(2)]
    assert await tenant_of(tmp_path, first) == "acme"
    await asyncio.to_thread(keys, tmp_path, "revoke", first.split("_")[1])
    with pytest.raises(AuthenticationError):
        await tenant_of(tmp_path, first)
    assert await tenant_of(tmp_path, second) == "acme"


def test_the_end_of_the_last_key_is_told(tmp_path: Path) -> None:
    """Revoking says when no key is left, for then nobody comes in any more, and not before."""
    ids = [keys(tmp_path, "create", "acme").stdout.split("_")[1] for _ in range(2)]
    said = [keys(tmp_path, "revoke", one).stderr for one in ids]
    assert ["no key is left" in text for text in said] == [False, True]


def test_programs_are_told_of_a_revocation(tmp_path: Path) -> None:
    """`revoke --format json` prints the id and what has become of it."""
    key_id = keys(tmp_path, "create", "acme").stdout.split("_")[1]
    told = json.loads(keys(tmp_path, "revoke", key_id, "--format", "json").stdout)
    assert told == {"key_id": key_id, "state": "revoked"}


def test_a_home_that_is_none_is_told(tmp_path: Path) -> None:
    """A home that is a file, and a database that is none, are errors of one line that name them."""
    (tmp_path / "file").write_text("mine")
    said = keys(tmp_path / "file", "create", "acme", code=1).stderr
    assert str(tmp_path / "file") in said
    assert "--home" in said
    (tmp_path / "tg-tinker.db").write_bytes(b"mine" * 1000)
    assert "tg-tinker.db cannot be used" in keys(tmp_path, "ls", code=1).stderr


def test_a_key_may_expire(tmp_path: Path) -> None:
    """--days sets the time after which a key is worth nothing."""
    made = json.loads(keys(tmp_path, "create", "acme", "--days", "2", "--format", "json").stdout)
    left = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=1) < left < timedelta(days=2)


def test_mistakes_are_told(tmp_path: Path) -> None:
    """A tenant or a name that is none, and a key that is not there, are one-line errors; listing makes no database."""
    assert keys(tmp_path, "create", "a/b", code=1).stderr.startswith("Error: tenant: expected")
    for name in ("", "x" * 129, "two\nlines", "\x1b[31m"):
        said = keys(tmp_path, "create", "acme", "--name", name, code=1).stderr
        assert said.startswith("Error: name: expected 1 to 128 printable characters")
    assert "keys ls" in keys(tmp_path, "revoke", "0123", code=1).stderr
    assert listed(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
