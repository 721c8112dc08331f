"""`tg-tinker audit`: reading the log, and catching whoever changed it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fixtures.programs import BATCH

from tg_tinker import InvalidRequestError, TrainingClient

pytestmark = pytest.mark.timeout(240)


def test_entries_of_a_run(tg, tc: TrainingClient) -> None:
    """Each operation is in the log when it was accepted and when it ended, with its outcome."""
    tc.forward_backward(BATCH).result()
    entries = tg.json("audit", "ls", "--run", tc.id, "--operation", "forward_backward")
    assert [(one["event"], one["success"]) for one in entries] == [("accepted", None), ("ended", True)]
    assert "forward_backward" in tg("audit", "ls", "--run", tc.id).stdout


def test_no_part_of_an_input_is_in_the_log(tg, tc: TrainingClient) -> None:
    """Of an operation that failed over a value in its batch, the log says where it was, not what it was."""
    with pytest.raises(InvalidRequestError, match="987654"):
        tc.forward_backward({"input_ids": [[72, 987654, 108]]}).result()
    (_, ended) = tg.json("audit", "ls", "--run", tc.id, "--operation", "forward_backward")
    assert re.fullmatch(r"batch\.input_ids\[0\]\[1\]: expected .*0 to 263", ended["error_message"])
    assert "987654" not in json.dumps({**ended, "entry_id": "", "prev_hash": "", "record_hash": ""})


def test_a_whole_log_is_held_against_the_heads_that_were_kept(tg, tc: TrainingClient, tmp_path: Path) -> None:
    """The first check keeps a head, the next one is held against it and keeps another."""
    heads = tmp_path / "heads.jsonl"
    assert "no head kept before" in tg("audit", "verify", "--heads", heads).stdout
    tc.forward_backward(BATCH).result()
    found = tg.json("audit", "verify", "--heads", heads)
    assert (found["ok"], found["heads_kept"]) == (True, 1)
    assert len(heads.read_text().splitlines()) == 2


def test_a_log_is_verified_without_a_server(tg, tc: TrainingClient, tmp_path: Path) -> None:
    """A saved log passes; changed, it is named by its first bad entry; cut off, a kept head gives it away."""
    tc.forward_backward(BATCH).result()
    log, heads = tmp_path / "log.json", tmp_path / "heads.jsonl"
    tg("audit", "verify", "--heads", heads)
    entries = tg.json("audit", "ls", "--all")
    offline = ("audit", "verify", "--log", log, "--heads", heads)
    log.write_text(json.dumps(entries))
    assert "is whole" in tg(*offline).stdout
    log.write_text(json.dumps(entries[:-2]))
    assert "truncated" in tg(*offline, code=1).stderr
    assert tg("audit", "verify", "--log", log).exit_code == 0  # nothing tells that it was cut off
    log.write_text(json.dumps([*entries[:1], {**entries[1], "operation": "sample"}, *entries[2:]]))
    assert f"entry 2 ({entries[1]['entry_id']})" in tg(*offline, code=1).stderr
    for wrong in ([{}], [*entries[:1], {**entries[1], "note": "added"}, *entries[2:]]):
        log.write_text(json.dumps(wrong))
        assert "is no log" in tg(*offline, code=1).stderr
