"""One file of a download: it grows as ``<name>.part`` and gets its name when it is whole and has the digest told.

Plain file work that blocks; no network. Names come from a server, and none of them may lead out of the folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.types.loops_results import CheckpointFile

__all__ = ["BAD_FILE", "PartFile", "bad_file", "place_all"]

BAD_FILE = "BAD_FILE"
_PART = ".part"
_FORBIDDEN = frozenset('\\:*?"<>|')  # what some file system takes for something else than a character of a name
_BLOCK = 1024 * 1024


class PartFile:
    """A file on its way to ``place``; ``have`` counts the bytes that are there, ``fetched`` those that came by now."""

    def __init__(self, file: CheckpointFile, place: Path) -> None:
        self.name = file.relative_file_name
        self.size = file.size_bytes
        self.have = 0
        self.fetched = 0
        self._place = place
        self._part = place.with_name(place.name + _PART)
        self._wanted = file.sha256
        self._digest = hashlib.sha256()

    def __repr__(self) -> str:
        """How far it is."""
        return f"<PartFile {self.name}: {self.have} of {self.size} bytes>"

    def look(self) -> bool:
        """Find what an earlier download left; say whether it is the whole file. Refuses one of other content."""
        for path in (self._place, self._part):
            if path.is_symlink():
                raise _refused(f"{path} is a link", "no links where files are to be written")
        if self._place.exists():
            if not self._is_here():
                message = f"{self._place} is there already, with another content"
                raise _refused(message, "a folder without other files of these names")
            return True
        self._place.parent.mkdir(parents=True, exist_ok=True)
        if self._part.exists():
            self._read(self._part)
            if self.have > self.size or (self.have == self.size and not self._fits()):
                self.restart()
        return False

    def append(self, piece: bytes) -> None:
        """Write what came. Raises ``ServerError`` where that is more than was announced."""
        if self.have + len(piece) > self.size:
            raise bad_file(self.name, f"has more than the {self.size} bytes announced")
        with self._part.open("ab") as file:
            file.write(piece)
        self._digest.update(piece)
        self.have += len(piece)
        self.fetched += len(piece)

    def restart(self) -> None:
        """Begin again at the first byte."""
        self._part.unlink(missing_ok=True)
        self._digest = hashlib.sha256()
        self.have = 0

    def finish(self) -> None:
        """Give the whole file its name. Raises ``ServerError`` where its digest is another than the one told."""
        if not self._fits():
            got = self._digest.hexdigest()
            self.restart()
            raise bad_file(self.name, f"has SHA-256 {got}, not {self._wanted}")
        with self._part.open("ab") as file:  # makes the file where it has no bytes at all
            os.fsync(file.fileno())
        self._part.replace(self._place)

    def _is_here(self) -> bool:
        """Whether what has the name is the file that is to have it."""
        if not self._place.is_file():
            return False
        self._read(self._place)
        return self._fits()

    def _fits(self) -> bool:
        return self.have == self.size and self._wanted in {None, self._digest.hexdigest()}

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                self._digest.update(block)
                self.have += len(block)


def place_all(folder: Path, files: Sequence[CheckpointFile]) -> list[PartFile]:
    """A place inside ``folder`` for each file. Raises ``ServerError`` where a name leads elsewhere, or two collide."""
    if folder.exists() and not folder.is_dir():
        raise _refused(f"{folder} is a file", "a folder")
    placed = [PartFile(file, _place(folder, file.relative_file_name)) for file in files]
    taken: set[str] = set()
    for name in sorted(one.name.casefold() for one in placed):  # a folder goes before what is in it
        folders = {name.rsplit("/", depth)[0] for depth in range(1, name.count("/") + 1)}
        if ({name, name + _PART} | folders) & taken:
            raise _unsafe(name, "collides with another one")
        taken |= {name, name + _PART}
    return placed


def bad_file(name: str, why: str) -> ServerError:
    """The error of a file that is not what the listing said."""
    return ServerError(f"the file {name!r} of the checkpoint {why}", code=BAD_FILE, details={"file": name})


def _place(folder: Path, name: str) -> Path:
    parts = name.split("/")
    if not all(map(_is_plain, parts)):
        raise _unsafe(name, "is no plain relative name")
    place = folder.joinpath(*parts)
    if not place.parent.resolve().is_relative_to(folder.resolve()):
        raise _unsafe(name, f"leads out of {folder}, by a link that is there")
    return place


def _is_plain(part: str) -> bool:
    return part.strip(" .") != "" and not part.endswith((".", " ")) and not any(map(_is_special, part))


def _is_special(character: str) -> bool:
    return character in _FORBIDDEN or not character.isprintable()


def _unsafe(name: str, why: str) -> ServerError:
    message = f"nothing was written: the file name {name!r} that the server gave {why}"
    return ServerError(message, code="UNSAFE_NAME", details={"file": name})


def _refused(message: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(f"dest_dir: {message}", field="dest_dir", constraint=constraint)
