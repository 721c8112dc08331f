"""Tokenizers as the server serves them: text files, written to a cache folder and read by transformers.

No code from a model repository is run, and a client encodes exactly as its server does.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tg_tinker.core.call import call
from tg_tinker.core.run import RunCore
from tg_tinker.errors import ResourceNotFoundError, ServerError
from tg_tinker.wire import tg

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokenizers", "load"]

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NEEDED = "tokenizer_config.json"

_lock = threading.Lock()
_loaded: dict[Path, PreTrainedTokenizerBase] = {}


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a fork copies the process, and perhaps a lock that a thread it lacks was holding
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load(files: tg.TokenizerFiles, home: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``files``, cached under ``home``; the same files give the same object.

    It blocks (importing transformers alone takes seconds), so coroutines call it in a worker thread.

    Raises ``ServerError`` where the files are not a tokenizer.
    """
    folder = home / "cache" / "tokenizers" / _digest(files)
    with _lock:
        if folder not in _loaded:
            _loaded[folder] = _read(_written(files, folder), files.model)
        return _loaded[folder]


def _digest(files: tg.TokenizerFiles) -> str:
    digest = hashlib.sha256()
    for name, text in sorted(files.files.items()):
        if not _PLAIN_NAME.fullmatch(name):
            raise ServerError(f"the server's tokenizer for {files.model} has a file of the improper name {name!r}")
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _written(files: tg.TokenizerFiles, folder: Path) -> Path:
    """The folder with the files in it: made beside its final place and moved there whole, so nobody sees half of it."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as draft:
        made = Path(draft) / "tokenizer"
        made.mkdir()
        for name, text in files.files.items():
            (made / name).write_text(text, encoding="utf-8", newline="")
        try:
            made.rename(folder)
        except OSError:  # another program was first, with the same files
            if not folder.is_dir():
                raise
    return folder


def _read(folder: Path, model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not (folder / _NEEDED).is_file():
        raise ServerError(f"the server's tokenizer for {model} has no {_NEEDED}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    # As wide as it gets: each tokenizer class of transformers raises what its own parser raises.
    except Exception as error:
        raise ServerError(f"cannot read the server's tokenizer for {model}: {error}") from error


class Tokenizers:
    """The tokenizers that one ``ServiceClient`` has asked for, by model."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._found: dict[str, PreTrainedTokenizerBase] = {}

    async def get(self, core: RunCore, model: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a model, fetched once from the server; runs at home.

        A server that has never heard of tokenizers (a published Loops trainer) is passed over for transformers and the
        hub.
        """
        if model not in self._found:
            try:
                files = await core.perform(call(tg.TOKENIZER, query={"model": model}))
            except ResourceNotFoundError as error:
                if error.resource_type is not None:
                    raise
                self._found[model] = await asyncio.to_thread(_read_from_hub, model)
            else:
                self._found[model] = await asyncio.to_thread(load, files, self._home)
        return self._found[model]


def _read_from_hub(model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    # As wide as it gets: the hub, the network and each tokenizer class raise errors of their own.
    except Exception as error:
        message = f"the server serves no tokenizers, and {model!r} cannot be had from the hub: {error}"
        raise ResourceNotFoundError(message, resource_type="model", resource_id=model) from error
