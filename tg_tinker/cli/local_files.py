"""Files that commands read and write for their user: what goes wrong is one line that says what to do."""

from __future__ import annotations

import os
from pathlib import Path

from tg_tinker import home
from tg_tinker.errors import InvalidRequestError

__all__ = ["make_empty_folder", "make_home", "read", "refuse_existing", "write"]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


def read(path: Path) -> bytes:
    """Read a whole file.

    Raises ``InvalidRequestError``.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused(path, "read", error) from error


def write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file that is not there yet, whole or not at all; a private one is readable by its owner alone.

    Raises ``InvalidRequestError``.
    """
    try:
        file = os.fdopen(os.open(path, _NEW, 0o600 if private else 0o666), "wb")
        try:
            with file:
                file.write(content)
        except BaseException:  # whatever it was, Ctrl-C among it: half a file must not look like one
            path.unlink()
            raise
    except OSError as error:
        raise _refused(path, "written", error) from error


def refuse_existing(path: Path) -> None:
    """Refuse, before any work is done, a file that ``write`` would refuse after it."""
    if path.exists():
        raise InvalidRequestError(f"{path} is there already; move it away, or name another file", field="output")
    if not path.absolute().parent.is_dir():
        raise InvalidRequestError(f"{path.parent} is no folder; make it, or name another", field="output")


def make_empty_folder(path: Path) -> None:
    """Make a private folder (0700), or take one that is empty.

    Raises ``InvalidRequestError``.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = any(path.iterdir())
    except OSError as error:
        raise _refused(path, "used as a folder", error) from error
    if held:
        raise InvalidRequestError(f"{path} is not empty; name another folder", field="output")


def make_home(given: Path | None) -> Path:
    """Give the home folder, made private where it was missing.

    Raises ``InvalidRequestError``.
    """
    from tg_tinker.store import files

    place = home.folder(given)
    try:
        files.make_folder(place)
    except OSError as error:
        reason = "it is no folder" if place.exists() else error.strerror
        message = f"home: nothing can be kept in {place}: {reason}; name another by --home or {home.VARIABLE}"
        raise InvalidRequestError(message, field="home", constraint="a folder that can be written to") from error
    return place


def _refused(path: Path, doing: str, error: OSError) -> InvalidRequestError:
    reason = "it is there already" if isinstance(error, FileExistsError) else error.strerror or str(error)
    return InvalidRequestError(f"{path} cannot be {doing}: {reason}; name another", field="path")
