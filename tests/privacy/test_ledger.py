from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import attrs
import pytest

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.privacy.accountant import Mechanism
from tg_tinker.privacy.ledger import Ledger, Release


def release(number: int, **changes: Any) -> Release:
    """Make a release."""
    fields: dict[str, Any] = {
        "lineage": "run-1",
        "step": number,
        "noise_multiplier": 1.1,
        "max_grad_norm": 0.5,
        "sample_rate": 0.01,
    }
    return Release(release_id=f"r{number}", **{**fields, **changes})


def the_file(folder: Path) -> Path:
    """Give the one ledger file."""
    (path,) = folder.glob("*.jsonl")
    return path


def test_releases_survive_a_restart(tmp_path: Path) -> None:
    """A ledger opened again holds what was appended, in order, in a private file."""
    ledger = Ledger(tmp_path, "run-1")
    for number in range(3):
        ledger.append(release(number))
    again = Ledger(tmp_path, "run-1")
    assert again.to_list() == ledger.to_list()
    assert [fields["step"] for fields in again.to_list()] == [0, 1, 2]
    assert the_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert len(Ledger(tmp_path, "run-2")) == 0


def test_no_file_name_holds_user_text(tmp_path: Path) -> None:
    """A lineage is no part of a path."""
    Ledger(tmp_path, "../escape")
    assert [path.parent for path in tmp_path.rglob("*")] == [tmp_path]


def test_a_replay_is_not_charged_twice(tmp_path: Path) -> None:
    """The same release appended again changes neither the count nor the file."""
    ledger = Ledger(tmp_path, "run-1")
    ledger.append(release(1))
    content = the_file(tmp_path).read_bytes()
    ledger.append(release(1))
    assert len(ledger) == 1
    assert the_file(tmp_path).read_bytes() == content
    assert "r1" in ledger
    assert "r2" not in ledger


def test_uniting_only_ever_adds(tmp_path: Path) -> None:
    """Loading an older or another ledger adds what is missing and takes nothing away."""
    ledger = Ledger(tmp_path, "run-1")
    for number in range(4):
        ledger.append(release(number))
    ledger.unite([release(1), release(2)])
    assert len(ledger) == 4
    ledger.unite([release(9, lineage="run-0", noise_multiplier=2.0), release(3)])
    assert len(Ledger(tmp_path, "run-1")) == 5
    assert ledger.counts() == {Mechanism(1.1, 0.01): 4, Mechanism(2.0, 0.01): 1}
    assert ledger.counts(and_then=Mechanism(2.0, 0.01)) == {Mechanism(1.1, 0.01): 4, Mechanism(2.0, 0.01): 2}


def test_other_lineages_are_read_as_far_as_they_are_here(tmp_path: Path) -> None:
    """What others released by now is found, but neither a torn line, nor one's own; a damaged ledger is an error."""
    ledger, other = Ledger(tmp_path, "run-1"), Ledger(tmp_path, "run-2")
    ledger.append(release(1))
    assert ledger.others(["run-1", "run-2", "run-3"]) == []
    other.append(release(2, lineage="run-2"))
    assert ledger.others(["run-1", "run-2", "run-3"]) == [release(2, lineage="run-2")]
    with other._path.open("ab") as file:
        file.write(b'{"release_id": "r3", "lin')
    assert len(ledger.others(["run-2"])) == 1
    other._path.write_bytes(b"garbage\n")
    with pytest.raises(ServerError, match="run-2 is damaged"):
        ledger.others(["run-2"])
    assert not (set(tmp_path.iterdir()) - {ledger._path, other._path})


def test_an_append_is_synced_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is on disk, synced, when append returns."""
    synced: list[int] = []
    ledger, real = Ledger(tmp_path, "run-1"), os.fsync

    def sync(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", sync)
    ledger.append(release(1))
    assert synced == [the_file(tmp_path).stat().st_size]


def test_a_torn_line_was_never_released(tmp_path: Path) -> None:
    """What a crash left of an append that never returned is dropped, and the next append is whole."""
    ledger = Ledger(tmp_path, "run-1")
    ledger.append(release(1))
    whole = the_file(tmp_path).read_bytes()
    the_file(tmp_path).write_bytes(whole + b'{"release_id": "r2", "lin')
    again = Ledger(tmp_path, "run-1")
    assert len(again) == 1
    again.append(release(3))
    assert [fields["release_id"] for fields in Ledger(tmp_path, "run-1").to_list()] == ["r1", "r3"]


@pytest.mark.parametrize("line", [b"garbage\n", b"{}\n", b"\xff\n"])
def test_a_damaged_ledger_is_not_guessed_at(tmp_path: Path, line: bytes) -> None:
    """A line that does not read makes the run unusable rather than ε too small."""
    ledger = Ledger(tmp_path, "run-1")
    ledger.append(release(1))
    the_file(tmp_path).write_bytes(line + the_file(tmp_path).read_bytes())
    with pytest.raises(ServerError, match="damaged"):
        Ledger(tmp_path, "run-1")


def test_a_failed_write_is_counted_and_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk refuses, the error is raised, the release counts all the same, and the next append writes both."""
    ledger = Ledger(tmp_path, "run-1")
    ledger.append(release(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "no space left", str(descriptor))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            ledger.append(release(2))
    assert len(ledger) == 2
    ledger.append(release(3))
    assert [fields["step"] for fields in Ledger(tmp_path, "run-1").to_list()] == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": -1.0},
        {"sample_rate": 0.0},
        {"sample_rate": 2.0},
        {"noise_multiplier": "nan"},
        {"step": None},
    ],
)
def test_an_impossible_release_is_refused(change: dict[str, Any]) -> None:
    """What a checkpoint claims is checked: nothing negative, no rate outside (0, 1]."""
    with pytest.raises(InvalidRequestError) as caught:
        Release.from_dict({**attrs.asdict(release(1)), **change})
    assert caught.value.field == "ledger"
