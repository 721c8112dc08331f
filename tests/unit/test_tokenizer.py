"""Tokenizers from the files that a server sends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tg_tinker import tokenizer
from tg_tinker.errors import ServerError
from tg_tinker.wire.tg import TokenizerFiles

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    """The tiny model's tokenizer, saved as the server saves it."""
    tiny = pytest.importorskip(
        "tg_tinker.engine.models.tiny", reason="the tiny model's tokenizer is made by the engine"
    )
    folder = tmp_path_factory.mktemp("saved")
    tiny.make_tokenizer().save_pretrained(folder)
    return TokenizerFiles(
        model="tiny", files={path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}
    )


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts without tokenizers in memory."""
    monkeypatch.setattr(tokenizer, "_loaded", {})


def test_a_tokenizer_encodes_as_the_one_that_was_saved(files: TokenizerFiles, tmp_path: Path) -> None:
    """Texts, special tokens and the chat template survive the way through files."""
    loaded = tokenizer.load(files, tmp_path)
    assert loaded.encode("Hé") == [72, 195, 169]
    assert loaded.decode([72, 195, 169]) == "Hé"
    assert (loaded.eos_token_id, loaded.pad_token_id) == (257, 258)
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<|user|>a<|end|>"


def test_the_same_files_give_the_same_object(files: TokenizerFiles, tmp_path: Path) -> None:
    """Threads that ask at once get one tokenizer, written once."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tokenizer.load(files, tmp_path), range(8)))
    assert len({id(one) for one in found}) == 1
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1


def test_files_in_the_cache_are_used_again(
    files: TokenizerFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later program reads what an earlier one wrote."""
    tokenizer.load(files, tmp_path)
    (folder,) = (tmp_path / "cache" / "tokenizers").iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    monkeypatch.setattr(tokenizer, "_loaded", {})
    tokenizer.load(files, tmp_path)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["../tokenizer.json", "a/b.json", ".hidden", "", "/etc/passwd", "con\x00.json"])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    """The server's names are file names, nothing more; a path writes nothing."""
    with pytest.raises(ServerError, match="improper name"):
        tokenizer.load(TokenizerFiles(model="m", files={name: "{}"}), tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": "not json"}], ids=["nothing", "nonsense"])
def test_files_that_are_no_tokenizer_are_the_servers_fault(files: dict[str, str], tmp_path: Path) -> None:
    """What transformers cannot read is a typed error that names the model."""
    with pytest.raises(ServerError, match=r"for m\b"):
        tokenizer.load(TokenizerFiles(model="m", files=files), tmp_path)
