"""`import tg_tinker` stays light, whatever else is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("aiohttp", "anyio", "cattrs", "numpy", "peft", "rich", "torch", "transformers")
PROBE = """
import sys
import {module}
heavy = sorted(set({heavy!r}) & {{name.partition(".")[0] for name in sys.modules}})
print(" ".join(heavy))
"""


def loaded_by(module: str, heavy: tuple[str, ...] = HEAVY) -> list[str]:
    """Import a module in a fresh interpreter and name the heavy libraries that came with it."""
    probe = PROBE.format(module=module, heavy=heavy)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", probe], capture_output=True, check=False, text=True, timeout=50
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("module", ["tg_tinker", "tg_tinker.errors", "tg_tinker.types.config", "tg_tinker.loops"])
def test_import_loads_nothing_heavy(module: str) -> None:
    """Neither the package nor its value types load a library that takes noticeable time."""
    assert loaded_by(module) == []


def test_commands_are_found_without_loading_them() -> None:
    """The command line starts without anything but click, so help and completion are instant."""
    assert loaded_by("tg_tinker.cli") == []


def test_client_core_needs_no_torch() -> None:
    """Everything a program needs to talk to a server elsewhere loads without torch, peft or transformers."""
    assert loaded_by("tg_tinker.core.transport", ("torch", "peft", "transformers")) == []
