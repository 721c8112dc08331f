"""Which server process accepted what: a name per process, and a lock file that the system frees when it dies.

Several servers may share a home; what a dead one left unfinished is failed by whoever notices.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Generator
from pathlib import Path

from tg_tinker.store import files

_NAME = re.compile(r"server-[0-9]+-[0-9a-f]{8}")


class Ownership:
    """The name of this process, locked as long as it lives."""

    def __init__(self, home: Path) -> None:
        self._folder = folder_of(home)
        files.make_folder(self._folder)
        self.name = f"server-{os.getpid()}-{secrets.token_hex(4)}"
        self._descriptor = self._claim()

    def is_dead(self, owner: str) -> bool:
        """Whether the process of that name has ended."""
        return owner != self.name and has_ended(self._folder, owner)

    def forget_dead(self) -> None:
        """Remove what servers that were killed left here; nothing is known of them that a missing file does not say."""
        for path in self._folder.glob("*.lock"):
            if self.is_dead(path.stem):
                path.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the name up."""
        _lock_of(self._folder, self.name).unlink(missing_ok=True)
        os.close(self._descriptor)

    def _claim(self) -> int:
        """Lock first, show then: a name that can be seen and is not locked is a dead process's."""
        hidden = self._folder / f".{self.name}"
        descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        hidden.rename(_lock_of(self._folder, self.name))
        return descriptor


def folder_of(home: Path) -> Path:
    """Where the servers over a home keep their names."""
    return home / "servers"


def has_ended(folder: Path, name: str) -> bool:
    """Whether no server process of that name runs; what was never a name of ours has ended."""
    if not _NAME.fullmatch(name):
        return True
    try:
        with _try_lock(_lock_of(folder, name)) as free:
            return free
    except FileNotFoundError:
        return True


def _lock_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.lock"


@contextlib.contextmanager
def _try_lock(path: Path) -> Generator[bool]:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
