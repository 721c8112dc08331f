"""``tg-tinker keys``: who may use a server. Works on the home's database; a server over it notices within seconds."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tg_tinker import home
from tg_tinker.cli import local_files
from tg_tinker.cli import output as out
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.types import checks

if TYPE_CHECKING:
    from tg_tinker.store.database import Database
    from tg_tinker.store.rows import ApiKeyRow

__all__ = ["command"]

T = TypeVar("T")

_COLUMNS = {
    "key_id": "Key",
    "tenant_id": "Tenant",
    "name": "Name",
    "state": "State",
    "created": "Created",
    "expires": "Expires",
}
_LONGEST_NAME = 128  # what the database's column is made for; SQLite alone would take more
_home = click.option("--home", "folder", type=click.Path(path_type=Path), help="Instead of TG_TINKER_HOME.")


@click.group("keys")
def command() -> None:
    """Make, list and revoke the API keys of a server over this home.

    Once there was one, the server answers nobody without a key, also when the last is revoked; before, it serves this
    machine alone.
    """


@command.command("create")
@click.argument("tenant")
@click.option("--name", help="What it is for; shown by `keys ls`.")
@click.option("--days", type=click.IntRange(1, 36500), help="How long it is good for; without it, until it is revoked.")
@_home
@out.format_option
@out.advice_for_people
def create_key(tenant: str, name: str | None, days: int | None, folder: Path | None, output: str) -> None:
    """Make an API key for TENANT, who is made known by it. It is shown now and never again."""
    _require_database()
    from tg_tinker.server.auth import new_key
    from tg_tinker.store.names import check_label

    check_label(tenant, "tenant")
    if name is not None and not (1 <= len(name) <= _LONGEST_NAME and name.isprintable()):
        raise checks.refuse("name", f"1 to {_LONGEST_NAME} printable characters", name)
    place = local_files.make_home(folder)
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    key, row = new_key(tenant, name=name, expires_at=expires)

    async def store(database: Database) -> None:
        await database.add_tenant(tenant, row.created_at)
        await database.add_api_key(row)

    _in_database(place, store)
    click.echo(json.dumps({"key": key, **_fields(row)}, indent=2) if output == out.JSON else key)
    out.hint(f"the key of tenant {tenant} is shown only now; its user sets TG_TINKER_API_KEY to it")


@command.command("ls")
@click.option("--tenant", help="Only keys of this tenant.")
@_home
@out.format_option
@out.advice_for_people
def list_keys(tenant: str | None, folder: Path | None, output: str) -> None:
    """List the keys by their ids; the keys themselves are stored nowhere."""
    _require_database()
    rows: list[ApiKeyRow] = _in_database(home.folder(folder), lambda found: found.list_api_keys(tenant), default=[])
    shown = [{**_fields(row), "created": out.when(row.created_at), "expires": out.when(row.expires_at)} for row in rows]
    out.show_rows([_fields(row) for row in rows] if output == out.JSON else shown, _COLUMNS, output)


@command.command("revoke")
@click.argument("key_id", metavar="KEY")
@_home
@out.format_option
@out.advice_for_people
def revoke_key(key_id: str, folder: Path | None, output: str) -> None:
    """Make the key with the id KEY useless, for good; a running server knows within five seconds."""
    _require_database()
    place, now = home.folder(folder), datetime.now(UTC)
    if not _in_database(place, lambda found: found.revoke_api_key(key_id, now), default=False):
        message = f"there is no key {key_id} to revoke; `tg-tinker keys ls` lists the ids"
        raise ResourceNotFoundError(message, resource_type="api_key", resource_id=key_id)
    out.say("{key_id} is revoked", {"key_id": key_id, "state": "revoked"}, output)
    if not any(row.usable(now) for row in _in_database(place, lambda found: found.list_api_keys())):
        out.hint("no key is left: a server over this home answers nobody until `tg-tinker keys create`")


def _fields(row: ApiKeyRow) -> dict[str, Any]:
    """What may be told of a key."""
    now = datetime.now(UTC)
    state = "revoked" if row.revoked_at is not None else "usable" if row.usable(now) else "expired"
    times = {name: getattr(row, name) for name in ("created_at", "expires_at", "revoked_at")}
    return {
        "key_id": row.key_id,
        "tenant_id": row.tenant_id,
        "name": row.name,
        "state": state,
        **{name: None if time is None else time.isoformat() for name, time in times.items()},
    }


def _in_database(place: Path, work: Callable[[Database], Awaitable[T]], *, default: T | None = None) -> T:
    """Open the home's database for one piece of work; where there is none, ``default`` is all there is to say."""
    from tg_tinker.store.database import Database, database_file
    from tg_tinker.store.sqlite import sqlite_url

    path = database_file(place)

    async def run() -> T:
        database = await Database.open(sqlite_url(path))
        try:
            return await work(database)
        finally:
            await database.close()

    if default is not None and not path.exists():
        return default
    return asyncio.run(run())


def _require_database() -> None:
    missing = [name for name in ("sqlalchemy", "aiosqlite") if importlib.util.find_spec(name) is None]
    if missing:
        message = (
            f"API keys live in the server's database, which needs {', '.join(missing)}: pip install 'tg-tinker[server]'"
        )
        raise InvalidRequestError(message, code="EXTRA_MISSING")
