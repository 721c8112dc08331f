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
        self._folder = home / "servers"
        files.make_folder(self._folder)
        self.name = f"server-{os.getpid()}-{secrets.token_hex(4)}"
        self._descriptor = self._open(self.name)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def is_dead(self, owner: str) -> bool:
        """Whether the process of that name has ended."""
        if owner == self.name or not _NAME.fullmatch(owner):
            return owner != self.name
        try:
            with self._try_lock(owner) as free:
                return free
        except FileNotFoundError:
            return True

    def release(self) -> None:
        """Give the name up."""
        self._path(self.name).unlink(missing_ok=True)
        os.close(self._descriptor)

    @contextlib.contextmanager
    def _try_lock(self, owner: str) -> Generator[bool]:
        descriptor = os.open(self._path(owner), os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(descriptor)

    def _open(self, owner: str) -> int:
        return os.open(self._path(owner), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def _path(self, owner: str) -> Path:
        return self._folder / f"{owner}.lock"
