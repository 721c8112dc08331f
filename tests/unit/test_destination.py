"""The file that an artifact is pulled to."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from tg_tinker.service import destination


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full, the file is as before, nothing half written has its name, and nothing stays beside it."""
    place = tmp_path / "state.tgart"
    destination.write(place, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        destination.write(place, b"new")
    monkeypatch.undo()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("state.tgart", b"old")]
    destination.write(str(place), b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("state.tgart", b"new")]


def test_a_link_and_a_pipe_are_written_through(tmp_path: Path) -> None:
    """What a link points to is replaced, not the link; what is no file is written to, not replaced."""
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "file")
    destination.write(link, b"content")
    assert (link.is_symlink(), (tmp_path / "file").read_bytes()) == (True, b"content")
    os.mkfifo(pipe)
    heard: list[bytes] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_bytes()))
    reader.start()
    destination.write(pipe, b"content")
    reader.join(10)
    assert (heard, pipe.is_fifo()) == ([b"content"], True)


def test_who_may_read_a_file_stays_as_it_is(tmp_path: Path) -> None:
    """A file that was made private is private when it has been replaced; its name may be as long as names can be."""
    place = tmp_path / ("x" * 255)
    place.touch(mode=0o600)
    destination.write(place, b"new")
    assert (place.stat().st_mode & 0o777, place.read_bytes()) == (0o600, b"new")
