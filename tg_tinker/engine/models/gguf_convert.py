"""Turn a quantised GGUF file into a folder of float32 safetensors that transformers loads in a second.

Every weight gets exactly the value that the quantisation stands for: nothing is rounded a second time. The work is done
by a child process, so its gigabyte of memory and its chatter end with it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from tg_tinker.errors import OperationFailedError

__all__ = ["WEIGHTS", "convert", "require_libraries"]

WEIGHTS: Final = "model.safetensors"
_LIBRARIES = ("torch", "transformers", "gguf", "safetensors")
_SECONDS = 1800.0


def require_libraries() -> None:
    """Check, before anything is downloaded, that the libraries are there.

    Raises ``OperationFailedError`` that says what to install.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        message = f"converting a model needs {', '.join(missing)}: run `python -m pip install 'tg-tinker[server]'`"
        raise OperationFailedError(message, operation="models fetch")


def convert(gguf: Path, folder: Path) -> None:
    """Write ``folder``: configuration, tokenizer with its chat template, and the weights as float32 safetensors.

    Raises ``OperationFailedError`` when the file cannot be read as a causal language model.
    """
    command = [sys.executable, "-m", __name__, str(gguf), str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    result = subprocess.run(
        command,
        env=environment,
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=_SECONDS,
    )
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"the converting process ended with {result.returncode}"
        raise OperationFailedError(f"cannot convert {gguf.name}: {reason}", operation="models fetch")


def write(gguf: Path, folder: Path) -> None:
    """Convert in this process; ``convert`` calls it in a child."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    # What is written is no longer quantised, and a config that says so would be refused at loading.
    model.config.__dict__.pop("quantization_config", None)
    folder.mkdir()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # named_parameters lists a tied tensor once, as safetensors wants it; loading ties it again.
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
