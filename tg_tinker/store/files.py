"""Files that survive a crash: written beside their place, synced, renamed, the folder synced. POSIX."""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Generator

TEMPORARY_SUFFIX = ".tmp"


def make_folder(path: Path) -> None:
    """Make a private folder (0700), and private parents where there are none, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing or [path]):  # one by one: ``parents=True`` would leave the parents open to others
        folder.mkdir(mode=0o700, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Make the renames and removals within a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    sync_folder(path)


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Give a temporary path (0600) to write to; it takes the place of ``path``, durably, unless an error says no."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Durably put ``content`` in the place of ``path``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def create(path: Path, content: bytes) -> bool:
    """Durably make a file that must not exist yet; tell whether this call made it. Nobody ever sees it half written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def secret(path: Path, size: int = 32) -> bytes:
    """Read a private file of random bytes, which is made once and kept."""
    if not path.exists():
        make_folder(path.parent)
        create(path, secrets.token_bytes(size))
    content = path.read_bytes()
    if len(content) != size or path.stat().st_mode & 0o077:
        message = f"the secret {path.name} must be {size} bytes that nobody else can read (chmod 600)"
        raise InvalidRequestError(message, field=path.name)
    return content


def subkey(key: bytes, label: str) -> bytes:
    """Derive a key for one purpose from a secret that serves several."""
    return hmac.digest(key, b"tg-tinker " + label.encode(), "sha256")


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold the lock file ``path`` against other threads and processes; the system frees it if the holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
