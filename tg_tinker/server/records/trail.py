"""What was accepted and what ended, appended to a file before anybody is told: it outlives a process that is killed.

A line is in the system's memory within microseconds, so nothing waits for it; only the machine's own death can lose it.
``recovery`` reads what a dead process left; what the database has got meanwhile is deleted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import attrs

from tg_tinker.errors import TGTinkerError
from tg_tinker.wire import codec

if TYPE_CHECKING:
    from tg_tinker.store.audit import AuditEvent

_log = logging.getLogger("tg_tinker.server")
_LONG = 4 * 2**20  # bytes; a longer file is closed, and deleted when the database has all of it

Step: TypeAlias = "tuple[AuditEvent, str | None]"  # and the idempotency key of an operation that was accepted


class Trail:
    """The files of one server process, all but the newest waiting to be deleted."""

    def __init__(self, folder: Path, owner: str) -> None:
        self._folder = folder
        self._owner = owner
        self._number = 0
        self._size = 0
        self._descriptor = self._open()

    @property
    def long(self) -> bool:
        """Whether it is time to turn to a new file."""
        return self._size > _LONG

    def add(self, event: AuditEvent, key: str | None = None) -> None:
        """Append a step; it is read again even if this process dies the next moment."""
        # A step that is torn, on a full disk, must not spoil the next one: each begins on a line of its own.
        try:
            self._size += os.write(self._descriptor, b"\n" + codec.dumps([attrs.asdict(event), key]))
        except (OSError, TGTinkerError, TypeError, ValueError):
            _log.exception("%s of %s is not safe from a crash yet", event.event, event.operation_id)

    def turn(self) -> int:
        """Go on in a new file; returns its number."""
        os.close(self._descriptor)
        self._number, self._size = self._number + 1, 0
        self._descriptor = self._open()
        return self._number

    def forget_before(self, number: int) -> None:
        """Delete the files before this one: the database has what is in them."""
        for path in _files(self._folder, self._owner):
            if _number(path) < number:
                path.unlink(missing_ok=True)

    def close(self, *, keep: bool) -> None:
        """End; what the database could not take is kept for the server that comes next."""
        os.close(self._descriptor)
        if not keep:
            forget(self._folder, self._owner)

    def _open(self) -> int:
        path = self._folder / f"{self._owner}.{self._number}.trail"
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def owners(folder: Path) -> set[str]:
    """The processes that left a trail: they run, or died."""
    return {path.name.partition(".")[0] for path in folder.glob("*.trail")}


def read(folder: Path, owner: str) -> list[Step]:
    """What a process wrote, in its order."""
    return [step for path in _files(folder, owner) for step in _steps(path)]


def forget(folder: Path, owner: str) -> None:
    """Delete what a process wrote."""
    for path in _files(folder, owner):
        path.unlink(missing_ok=True)


def _files(folder: Path, owner: str) -> list[Path]:
    return sorted(folder.glob(f"{owner}.*.trail"), key=_number)


def _number(path: Path) -> int:
    return int(path.name.split(".")[1])


def _steps(path: Path) -> Iterator[Step]:
    from tg_tinker.store.audit import AuditEvent

    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:  # another server was faster
        return
    for line in filter(None, lines):
        try:
            event, key = codec.loads(line)
            yield codec.decode(AuditEvent, event), key
        except (TGTinkerError, TypeError, ValueError):
            _log.error("%s has a line that was not written to its end", path.name)
