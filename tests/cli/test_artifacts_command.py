"""`tg-tinker artifacts`: pulled with a server, opened without one."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from fixtures.programs import BATCH, LOOPS_RANK, MODEL

from tg_tinker import ServiceClient, TrainingClient, open_artifact
from tg_tinker.store.keys import KeyFile

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def saved(tc: TrainingClient) -> str:
    """The id of a sealed state after one step."""
    tc.forward_backward(BATCH).result()
    tc.optim_step().result()
    return tc.save_state(metadata={"note": "first"}).artifact_id


def test_pull_and_open_elsewhere(tg, tc: TrainingClient, saved: str, tmp_path: Path, monkeypatch) -> None:
    """What was pulled opens on a machine that has nothing but the exported key, and says what is inside."""
    pulled, key = tmp_path / "state.tgart", tmp_path / "key.json"
    (listed,) = tg.json("artifacts", "ls", "--run", tc.id)
    assert (listed["artifact_id"], listed["step"], listed["metadata"]) == (saved, 1, {"note": "first"})
    tg("artifacts", "pull", saved, "--output", pulled)
    tg("artifacts", "export-key", key)
    assert key.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("TG_TINKER_HOME", str(tmp_path / "elsewhere"))
    assert "--key" in tg("artifacts", "open", pulled, code=1).stderr
    assert not (tmp_path / "elsewhere").exists()
    told = tg.json("artifacts", "open", pulled, "--key", key, "--output", tmp_path / "inside")
    assert (told["artifact_id"], told["step"], told["base_model"]) == (saved, 1, "tg-tinker/tiny")
    written = safetensors.numpy.load_file(tmp_path / "inside" / "tensors.safetensors")
    for name, array in open_artifact(pulled, key).tensors.items():
        assert np.array_equal(written[name], array)
    assert json.loads((tmp_path / "inside" / "counters.json").read_text())["step"] == 1


def test_programs_are_told_what_was_done(tg, saved: str, tmp_path: Path) -> None:
    """With --format json each command that does something prints one JSON value, and nothing for people beside it."""
    pulled, key, adapter = tmp_path / "state.tgart", tmp_path / "key.json", tmp_path / "adapter"
    told = tg.json("artifacts", "pull", saved, "--output", pulled)
    assert (told["artifact_id"], told["file"], told["size_bytes"]) == (saved, str(pulled), pulled.stat().st_size)
    assert tg.json("artifacts", "export-key", key) == {"file": str(key), "tenant": "local"}
    assert tg.json("artifacts", "export-peft", pulled, adapter, "--key", key) == {"folder": str(adapter), "step": 1}
    rotated = tg.json("artifacts", "rotate-key")
    assert rotated["key_id"] == tg.json("artifacts", "open", saved)["key_id"]
    assert rotated["rewrapped"] >= 1
    assert tg.json("artifacts", "rm", saved, "--yes") == [{"artifact_id": saved, "deleted": True}]


def test_nothing_is_overwritten(tg, saved: str, tmp_path: Path) -> None:
    """Neither a pull nor an export replaces a file that is there; nothing goes into a folder that holds something."""
    there = tmp_path / "there"
    there.write_text("mine")
    for command in (("pull", saved, "--output", there), ("export-key", there), ("export-peft", saved, tmp_path)):
        assert str(tmp_path) in tg("artifacts", *command, code=1).stderr
    assert there.read_text() == "mine"


def test_half_a_file_is_none(tg, saved: str, tmp_path: Path) -> None:
    """When the disk is full, a pull says so and leaves no file, so that it can be tried again."""
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    pulled = tmp_path / "state.tgart"
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, room[1]))
    try:
        assert "cannot be written" in tg("artifacts", "pull", saved, "--output", pulled, code=1).stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not pulled.exists()
    tg("artifacts", "pull", saved, "--output", pulled)


def test_a_published_version_is_exported_too(tg, service: ServiceClient, tmp_path: Path) -> None:
    """What was published for sampling becomes a peft folder as a training state does, of the same base model."""
    trainer = service.create_lora_training_client(MODEL, LOOPS_RANK, seed=1)
    trainer.save_weights_for_sampler("published").result()
    (artifact,) = [one for one in service.list_artifacts() if one.training_client_id == trainer.run_id]
    assert tg.json("artifacts", "open", artifact.artifact_id)["base_model"] == MODEL
    tg("artifacts", "export-peft", artifact.artifact_id, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (MODEL, LOOPS_RANK)


def test_rotation_keeps_everything_readable(tg, tc: TrainingClient, saved: str, tmp_path: Path) -> None:
    """After a rotation the server restores what was saved before, and older files open with older key files."""
    pulled, key = tmp_path / "state.tgart", tmp_path / "key.json"
    tg("artifacts", "pull", saved, "--output", pulled)
    tg("artifacts", "export-key", key)
    before = tg.json("artifacts", "open", saved)["key_id"]
    assert "export again" in tg("artifacts", "rotate-key").stderr
    assert tg.json("artifacts", "open", saved)["key_id"] != before
    assert tc.load_state(saved).exact
    assert tg.json("artifacts", "open", pulled, "--key", key)["key_id"] == before


def test_a_key_that_is_given_is_the_one_that_is_used(tg, saved: str, tmp_path: Path) -> None:
    """--key counts for an artifact of the home as well, which may have lost its own; without it the home's is taken."""
    key, stranger = tmp_path / "key.json", tmp_path / "stranger.json"
    tg("artifacts", "export-key", key)
    stranger.write_bytes(KeyFile(tmp_path / "elsewhere").export("local"))
    assert tg.json("artifacts", "open", saved, "--key", key)["artifact_id"] == saved
    assert "not among the keys given" in tg("artifacts", "open", saved, "--key", stranger, code=1).stderr
    assert "there is no" in tg("artifacts", "open", saved, "--key", key, "--home", tmp_path / "gone", code=1).stderr
    assert not (tmp_path / "gone").exists()
    lacking = tg("artifacts", "rotate-key", "--home", tmp_path / "nowhere", code=1).stderr
    assert "--home" in lacking
    assert "--key" not in lacking  # it takes none


def test_an_adapter_becomes_a_peft_folder(tg, saved: str, tmp_path: Path) -> None:
    """export-peft writes the adapter alone, with its rank and base model."""
    tg("artifacts", "export-peft", saved, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "tg-tinker/tiny")
    names = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names
    assert all("lora_" in name and not name.startswith("exp_avg") for name in names)


def test_damage_and_strangers_are_told_apart(tg, saved: str, tmp_path: Path) -> None:
    """A flipped bit, a file that is none, and an id that is unknown are each an error of one line."""
    pulled = tmp_path / "state.tgart"
    tg("artifacts", "pull", saved, "--output", pulled)
    content = bytearray(pulled.read_bytes())
    content[-100] ^= 1
    pulled.write_bytes(content)
    assert "damaged" in tg("artifacts", "open", pulled, code=1).stderr
    pulled.write_text("hello")
    assert "no pulled artifact" in tg("artifacts", "open", pulled, code=1).stderr
    assert "cannot be read" in tg("artifacts", "open", tmp_path / "none", code=1).stderr
    assert "--tenant" in tg("artifacts", "open", saved, "--tenant", "nobody", code=1).stderr
    tg("artifacts", "rm", saved, "--yes")
    assert "no such artifact" in tg("artifacts", "pull", saved, "--output", tmp_path / "other", code=1).stderr
