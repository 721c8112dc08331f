from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.store import files


def test_a_failed_replacement_leaves_the_old_content(tmp_path: Path) -> None:
    """When writing fails, the file is as before and nothing temporary stays."""
    path = tmp_path / "file"
    files.write(path, b"old")

    def fail() -> None:
        with files.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"old")]


def test_only_one_creator_wins(tmp_path: Path) -> None:
    """Creating a file that exists changes nothing and says so."""
    path = tmp_path / "file"
    assert files.create(path, b"first")
    assert not files.create(path, b"second")
    assert path.read_bytes() == b"first"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_private_with_the_parents_it_needs(tmp_path: Path) -> None:
    """Nobody else may look into a folder that is made, nor into those made above it; what was there stays as it is."""
    tmp_path.chmod(0o755)
    files.make_folder(tmp_path / "home" / "keys")
    files.make_folder(tmp_path / "home" / "keys")
    made = (tmp_path, tmp_path / "home", tmp_path / "home" / "keys")
    assert [folder.stat().st_mode & 0o777 for folder in made] == [0o755, 0o700, 0o700]


def test_a_secret_is_made_once_and_private(tmp_path: Path) -> None:
    """A secret file is drawn at first use, read afterwards, and refused when others may read it or it is cut."""
    path = tmp_path / "deep" / "secret"
    secret = files.secret(path)
    assert len(secret) == 32
    assert files.secret(path) == secret
    path.chmod(0o640)
    with pytest.raises(InvalidRequestError, match="chmod 600"):
        files.secret(path)
    path.chmod(0o600)
    path.write_bytes(secret[:-1])
    with pytest.raises(InvalidRequestError, match="32 bytes"):
        files.secret(path)


def test_a_lock_excludes_other_threads(tmp_path: Path) -> None:
    """While one thread holds the lock, another waits for it."""
    entered = threading.Event()

    def contend() -> None:
        with files.locked(tmp_path / "lock"):
            entered.set()

    with files.locked(tmp_path / "lock"):
        other = threading.Thread(target=contend)
        other.start()
        assert not entered.wait(0.05)
    assert entered.wait(10)
    other.join(10)
