"""Loading base models: the built-in tiny one, local folders, and everything that can be wrong with a name."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.hub import HangUp
from fixtures.training import tiny
from safetensors.torch import load_file, save_file

from tg_tinker.engine.models import base_model
from tg_tinker.engine.models import tiny as tiny_module
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, ServerError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_module.make_model().save_pretrained(folder)
    tiny_module.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of that folder which a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(ref: object, **settings: str) -> base_model.BaseModel:
    """Load on the CPU from a home that holds nothing."""
    return base_model.load(str(ref), home=Path("no-home"), device="cpu", **settings)


PROBE = """
from pathlib import Path
from tg_tinker.engine.models import base_model
from tg_tinker.errors import ResourceNotFoundError
print(base_model.load("tg-tinker/tiny", home=Path("no-home"), device="cpu").digest)
try:
    base_model.load("nobody/no-such-model", home=Path("no-home"), device="cpu")
except ResourceNotFoundError as error:
    print(error.resource_type, error.resource_id, "check the name and the network" in error.message)
"""

CACHED = """
from pathlib import Path
from tg_tinker.engine.models import base_model
from tg_tinker.errors import ResourceNotFoundError
print(base_model.load("nobody/kept", home=Path("no-home"), device="cpu").digest)
try:
    base_model.load("nobody/no-such-model", home=Path("no-home"), device="cpu")
except ResourceNotFoundError as error:
    print(error.resource_id)
"""


def test_tiny_is_the_same_in_every_process_and_an_unreachable_hub_id_is_not_found() -> None:
    """Another process builds the same tiny model; a hub id that cannot be had is an error that says what to do."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert probe.stdout.splitlines() == [tiny().digest, "model nobody/no-such-model True"]


def test_without_a_network_a_model_fetched_before_is_read_at_once(saved: Path, tmp_path: Path) -> None:
    """The hub is asked one question; unanswered, the cache is used, and what is not in it is not found."""
    cached = tmp_path / "hub" / "models--nobody--kept"
    shutil.copytree(saved, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    with HangUp() as hub:
        environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
        probe = subprocess.run(
            [sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
    assert probe.stdout.splitlines() == [load(saved).digest, "nobody/no-such-model"]
    assert hub.connections == 2  # one question for each


def test_tiny_knows_its_own_shape() -> None:
    """The tiny model is about a million frozen parameters, and says its vocabulary, length and end tokens."""
    base = tiny()
    assert 900_000 < base.model.num_parameters() < 1_200_000
    assert (base.vocab_size, base.max_length, base.dtype) == (264, 2048, torch.float32)
    assert base.eos_token_ids == {257, 262}
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.name == "tg-tinker/tiny"


def test_tiny_is_not_uniform() -> None:
    """The tiny model has opinions: the entropy of its next token is well below that of a fair die."""
    logits = tiny().model(torch.arange(64).view(4, 16)).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert 0.3 * torch.tensor(264.0).log() < entropy < 0.8 * torch.tensor(264.0).log()


def test_loading_leaves_the_global_random_state_alone() -> None:
    """Building the tiny model draws nothing from torch's global generator."""
    before = torch.random.get_rng_state()
    load("tg-tinker/tiny")
    assert torch.equal(before, torch.random.get_rng_state())


def test_built_in_names_open_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in names are resolved without the network."""

    def refuse(*_: object) -> None:
        pytest.fail("a built-in model tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load("tg-tinker/tiny")
    with pytest.raises(ResourceNotFoundError):
        load("tg-tinker/smollm2-135m")


@pytest.mark.parametrize("text", ["plain", "naïve — 数学 🙂", "tabs\tand\nlines", ""])
def test_tiny_tokenizer_is_bytes(text: str) -> None:
    """A text is its UTF-8 bytes, and decoding gives it back."""
    ids = tiny().tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tiny().tokenizer.decode(ids) == text


def test_tiny_tokenizer_has_special_tokens_and_a_chat_template() -> None:
    """Special tokens are single ids after the bytes, and a chat is written with them."""
    tokenizer = tiny().tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    chat = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == [260, *b"hi", 262, 261]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_a_local_folder_loads(saved: Path) -> None:
    """A folder that transformers wrote gives the same logits as the model it was written from."""
    tokens = torch.arange(32).view(2, 16)
    base = load(saved)
    assert torch.equal(base.model(tokens).logits, tiny().model(tokens).logits)
    assert base.tokenizer.encode("hé") == list("hé".encode())
    assert base.eos_token_ids == {257, 262}


def test_the_digest_tells_models_apart(folder: Path, saved: Path) -> None:
    """The same folder has the same digest, and one changed weight another."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(saved).digest == load(saved).digest != load(folder).digest


def test_the_digest_is_the_same_in_bfloat16(saved: Path) -> None:
    """A model is the same one in either precision, so that what was trained on a CPU goes on on a GPU."""
    assert load(saved).digest == load(saved, dtype="bf16").digest


def test_smollm2_that_was_not_fetched_says_how_to_fetch_it(tmp_path: Path) -> None:
    """The error of the model that needs a download names the command."""
    with pytest.raises(ResourceNotFoundError, match="tg-tinker models fetch smollm2-135m") as caught:
        base_model.load("tg-tinker/smollm2-135m", home=tmp_path)
    assert caught.value.resource_type == "model"


def test_smollm2_is_read_from_its_folder(saved: Path, tmp_path: Path) -> None:
    """The built-in name takes the folder under home, and keeps its name."""
    shutil.copytree(saved, tmp_path / "models" / "smollm2-135m")
    base = base_model.load("tg-tinker/smollm2-135m", home=tmp_path, device="cpu")
    assert base.name == "tg-tinker/smollm2-135m"


@pytest.mark.parametrize("ref", ["tg-tinker/huge", "./no-such-folder", "/no/such/folder"])
def test_an_unknown_model_is_not_found(ref: str) -> None:
    """A name that is neither built in nor a folder is a typed error without asking a hub."""
    with pytest.raises(ResourceNotFoundError) as caught:
        load(ref)
    assert caught.value.resource_id == ref


def _drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")


def _unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))


def _truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _lose_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _drop_config,
        _break_config,
        _unknown_architecture,
        _truncate_weights,
        _lose_a_weight,
        _only_pickle,
        _drop_tokenizer,
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, damage) -> None:
    """Whatever is broken in a folder, the error names the model, and nothing is filled in with random numbers."""
    damage(folder)
    with pytest.raises(ResourceNotFoundError) as caught:
        load(folder)
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"dtype": "float16"}, "dtype"), ({"dtype": "int8"}, "dtype"), ({"device": "warp:9"}, "device")],
)
def test_a_dtype_or_device_that_cannot_be_is_refused(settings: dict[str, str], field: str) -> None:
    """fp16 on a CPU and devices that do not exist are named as the wrong field."""
    with pytest.raises(InvalidRequestError) as caught:
        base_model.load("tg-tinker/tiny", home=Path("no-home"), **({"device": "cpu"} | settings))
    assert caught.value.field == field


def test_running_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's complaint becomes a server error with advice."""

    def exhausted(_dtype: torch.dtype) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(tiny_module, "make_model", exhausted)
    with pytest.raises(ServerError, match="choose a smaller model") as caught:
        load("tg-tinker/tiny")
    assert caught.value.code == "OUT_OF_MEMORY"


def test_loading_reports_its_stages() -> None:
    """The progress callback hears what is being done."""
    heard: list[str] = []
    base_model.load("tg-tinker/tiny", home=Path("no-home"), device="cpu", progress=heard.append)
    assert heard[0] == "loading tg-tinker/tiny"
