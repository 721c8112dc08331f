"""Servers that cannot open, or cannot close well: whatever was opened by then is closed again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.fake_engine import FakeEngine

from tg_tinker.server import rooms as rooms_module
from tg_tinker.server.auth import Keys
from tg_tinker.server.records.recovery import Recovery
from tg_tinker.server.records.trail import Trail
from tg_tinker.server.rooms import Rooms
from tg_tinker.server.settings import Settings
from tg_tinker.server.weights.models import Models
from tg_tinker.store.audit import HeadSigner


class BrokenError(Exception):
    """What went wrong."""


def fails(*_: Any, **__: Any) -> Any:
    """Stand in for whatever it is that fails."""
    raise BrokenError


async def fails_later(*_: Any, **__: Any) -> Any:
    """The same, awaited."""
    raise BrokenError


def silent(_: str) -> None:
    """Report to nobody."""


async def opened(home: Path) -> Rooms:
    """The parts of a server over ``home``."""
    return await Rooms.open(Settings(home=home, keys={"key": "tenant"}), None, silent)


def left(home: Path) -> list[str]:
    """The files that say that a server lives, and the threads of databases, but those that are just ending."""
    workers = [thread for thread in threading.enumerate() if "connection_worker" in thread.name]
    for worker in workers:
        worker.join(30.0)
    files = [path.name for path in (home / "servers").iterdir()] if (home / "servers").exists() else []
    return files + [worker.name for worker in workers if worker.is_alive()]


@pytest.mark.parametrize(
    ("owner", "name", "failure"),
    [
        (HeadSigner, "__init__", fails),
        (Recovery, "after_all", fails_later),
        (Trail, "__init__", fails),
        (Keys, "usable", fails_later),
        (rooms_module, "_torch_engine", fails),
    ],
    ids=["key", "recovery", "trail", "tenants", "engine"],
)
async def test_what_fails_while_opening_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, failure: Callable[..., Any]
) -> None:
    """Wherever opening fails, the database is closed and the home is given up, and the failure is told as it is."""
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises(BrokenError):
        await opened(tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize(("part", "failure"), [(Models, fails_later), (Rooms, fails)], ids=["models", "aside"])
async def test_what_fails_while_closing_keeps_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: type, failure: Callable[..., Any]
) -> None:
    """One part that does not close well keeps neither the device thread nor the database, and the home is given up."""
    engine: Any = FakeEngine()
    rooms = await Rooms.open(Settings(home=tmp_path, keys={"key": "tenant"}), engine, silent)
    monkeypatch.setattr(part, "aclose" if part is Models else "_clear_aside", failure)
    with pytest.raises(BrokenError):
        await rooms.aclose()
    assert left(tmp_path) == []
    assert not any(thread.name == "tg-tinker-device" for thread in threading.enumerate())
