"""What this machine has and lacks, as findings. It looks and asks; it changes nothing and downloads nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from typing import Final, Literal

import attrs

from tg_tinker import home
from tg_tinker.errors import InvalidRequestError

__all__ = ["Finding", "findings"]

State = Literal["ok", "note", "missing"]

CLIENT: Final = ("aiohttp", "anyio", "attrs", "cattrs", "numpy", "platformdirs", "rich", "transformers")
SERVER: Final = (
    "aiosqlite", "cryptography", "gguf", "opacus", "peft", "safetensors", "SQLAlchemy", "tink", "torch",
)  # fmt: skip
_LITTLE = 3e9  # bytes of disk that a few runs and the demo's model want


@attrs.frozen
class Finding:
    """One thing looked at: "ok", "note" (works, but worth knowing) or "missing", and then what to do."""

    what: str
    state: State
    detail: str
    advice: str = ""


def findings() -> Iterator[Finding]:
    """Look at everything, in the order in which a lack would hurt."""
    yield _python()
    yield _packages("client", CLIENT, "tg-tinker")
    yield _packages("server", SERVER, "tg-tinker[server]")
    yield _device()
    yield _home()
    yield _model()
    yield _target()


def _python() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}, {cores} cores")


def _packages(what: str, names: tuple[str, ...], requirement: str) -> Finding:
    versions = {name: _version(name) for name in names}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        advice = f"python -m pip install '{requirement}'"
        return Finding(what, "missing", f"not installed: {', '.join(missing)}", advice)
    return Finding(what, "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(
            "device", "note", "unknown without torch", "a server elsewhere needs no torch here: give its base_url"
        )
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Finding("device", "ok", f"{name}: {free / 1e9:.0f} of {total / 1e9:.0f} GB free; bf16")
    if torch.version.cuda is not None:
        advice = "check the driver, or install a CPU build of torch to save gigabytes"
        return Finding("device", "note", f"torch {torch.__version__} sees no GPU: the CPU is used, fp32", advice)
    return Finding(
        "device", "ok", f"CPU, fp32, torch {torch.__version__}; fine for models of a few hundred million parameters"
    )


def _home() -> Finding:
    folder = home.folder()
    standing = next(path for path in (folder, *folder.parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        advice = f"set {home.VARIABLE} to a folder that you may write to"
        return Finding("home", "missing", f"{standing} cannot be written to", advice)
    free = shutil.disk_usage(standing).free
    if free < _LITTLE:
        advice = f"free some, or set {home.VARIABLE} to another disk"
        return Finding("home", "note", f"{folder}: only {free / 1e9:.1f} GB free", advice)
    detail = f"{folder}: {free / 1e9:.0f} GB free"
    if not folder.exists():
        return Finding("home", "ok", f"{detail}, made on first use")
    if os.name == "posix" and folder.stat().st_mode & 0o077:
        return Finding("home", "note", f"{detail}; other users of this machine can look into it", f"chmod 700 {folder}")
    return Finding("home", "ok", detail)


def _model() -> Finding:
    from tg_tinker.engine.models import fetch, models_home

    if fetch.is_fetched(models_home.SMOLLM2, home.folder()):
        return Finding("model", "ok", f"{models_home.SMOLLM2} is here")
    advice = "tg-tinker models fetch smollm2-135m (the demo does it by itself)"
    return Finding("model", "note", f"{models_home.SMOLLM2} is not here yet", advice)


def _target() -> Finding:
    from tg_tinker import settings

    try:
        chosen = settings.resolve()
    except InvalidRequestError as error:
        return Finding("target", "missing", str(error), "set or unset what the message names")
    if chosen.base_url is None:
        return Finding("target", "ok", "ServiceClient() runs a server on this machine")
    return Finding("target", "ok", f"ServiceClient() talks to {chosen.base_url}, which the environment names")
