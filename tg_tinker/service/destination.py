"""The file that a download goes to: checked before anything is asked for, and written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tg_tinker.types import checks

__all__ = ["check_destination", "write"]


def check_destination(destination: object) -> None:
    """Refuse what no file can be written to. Raises ``InvalidRequestError``."""
    if not isinstance(destination, str | os.PathLike):
        raise checks.refuse("destination", "a file to write, or None", destination)
    place = Path(destination).expanduser().absolute()
    if place.is_dir() or not place.parent.is_dir():
        raise checks.refuse("destination", "a file, in a folder that is there", destination)


def write(destination: str | os.PathLike[str], content: bytes) -> None:
    """Put ``content`` in its place at once; where that fails, what was there is there still."""
    place = Path(destination).expanduser().resolve()
    if place.exists() and not place.is_file():  # a pipe, a device: those are for writing to, not for replacing
        place.write_bytes(content)
        return
    part = place.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            if place.exists():
                part.chmod(place.stat().st_mode)  # who may read it is as before
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)
