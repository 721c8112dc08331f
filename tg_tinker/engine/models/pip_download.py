"""Download one wheel with this Python's own pip, and tell how far it is. Nothing is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tg_tinker.errors import OperationFailedError

__all__ = ["download"]

_POLL_SECONDS = 0.1
_TEMPORARY = ("TMPDIR", "TEMP", "TMP")


def download(requirement: str, folder: Path, progress: Callable[[int], None]) -> Path:
    """Download the wheel of ``requirement`` into ``folder``; ``progress`` gets the bytes that have arrived.

    Raises ``OperationFailedError`` with pip's own last words when the registry cannot be reached or lacks it.
    """
    arriving, arrived = folder / "arriving", folder / "arrived"
    for place in (arriving, arrived):
        place.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(arrived), requirement]
    with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
        # pip writes below the temporary folder first: giving it one of our own lets us watch the file grow.
        environment = os.environ | {name: str(arriving) for name in _TEMPORARY}
        with subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment) as process:
            _watch(process, folder, progress)
        log.seek(0)
        wheels = list(arrived.glob("*.whl"))
        if process.returncode != 0 or not wheels:
            raise OperationFailedError(_advice(requirement, log.read()), operation="models fetch")
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, progress: Callable[[int], None]) -> None:
    try:
        while process.poll() is None:
            progress(_bytes_in(folder))
            time.sleep(_POLL_SECONDS)
    except BaseException:  # Ctrl-C: pip must not go on without us
        process.terminate()
        raise
    progress(_bytes_in(folder))


def _bytes_in(folder: Path) -> int:
    """Add up the files that are there at this moment; pip moves and removes them as it likes."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _advice(requirement: str, log: str) -> str:
    if "No module named pip" in log:
        return f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, or pass a downloaded file as --wheel"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip said nothing"]
    where = "check the network, or download the wheel elsewhere and pass it as --wheel"
    return f"pip could not download {requirement}: {errors[0]}; {where}"
