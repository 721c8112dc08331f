"""A machine with the client alone: everything loads, values work, and what is missing is said together with its cure.

Each program runs in a process that cannot find the libraries of the extra, installed or not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HIDE = """
import importlib.util
import sys

names = {"torch", "peft", "gguf", "safetensors", "sqlalchemy", "aiosqlite", "tink", "opacus", "cryptography"}
found = importlib.util.find_spec

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def find_spec(name, package=None):
    return None if name.partition(".")[0] in names else found(name, package)

importlib.util.find_spec = find_spec
sys.meta_path.insert(0, Hidden())
"""


def run(program: str, home: Path) -> str:
    """Run a program without the libraries and give what it prints."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", HIDE + program],
        capture_output=True,
        check=False,
        env=os.environ | {"TG_TINKER_HOME": str(home)},
        text=True,
        timeout=55,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_everything_public_is_there(tmp_path: Path) -> None:
    """Every public name of both surfaces can be had."""
    program = """
import tg_tinker, tg_tinker.loops
for module in (tg_tinker, tg_tinker.loops):
    for name in module.__all__:
        getattr(module, name)
print("all there")
"""
    assert run(program, tmp_path) == "all there\n"


def test_values_need_no_torch(tmp_path: Path) -> None:
    """Batches, datums and configs are made and checked, and cross the wire, without torch."""
    program = """
from tg_tinker import BatchData, TrainingConfig
from tg_tinker.loops import Datum, ModelInput, TensorData
print(BatchData([[1, 2], [3, 4]]).attention_mask.sum())
print(TrainingConfig(model_ref="tg-tinker/tiny").lora_config.rank)
print(Datum(ModelInput.from_ints([1, 2]), {"target_tokens": TensorData([2, -100], "int64")}).to_dict()["model_input"])
"""
    assert run(program, tmp_path).splitlines()[:2] == ["4", "16"]


@pytest.mark.parametrize(
    "use",
    [
        'service.create_training_client(tg_tinker.TrainingConfig(model_ref="tg-tinker/tiny"))',
        'service.create_lora_training_client("tg-tinker/tiny", rank=8)',
    ],
)
def test_server_of_one_s_own_says_what_to_install(use: str, tmp_path: Path) -> None:
    """Without a base_url and without the extra, the error names both ways on."""
    program = f"""
import tg_tinker
service = tg_tinker.ServiceClient()
try:
    {use}
except tg_tinker.ServerUnreachableError as error:
    print(error)
service.close()
"""
    said = run(program, tmp_path)
    assert "pip install 'tg-tinker[server]'" in said
    assert "base_url" in said


def test_doctor_prescribes_the_extra(tmp_path: Path) -> None:
    """`tg-tinker doctor` runs, and so does `models ls`."""
    program = """
from click.testing import CliRunner
from tg_tinker.cli import main
print(CliRunner().invoke(main, ["models", "ls"]).output)
print(CliRunner().invoke(main, ["models", "fetch", "smollm2-135m"]).output)
print(CliRunner().invoke(main, ["doctor"]).output)
"""
    said = run(program, tmp_path)
    assert "tg-tinker/tiny" in said
    assert "converting a model needs torch, gguf, safetensors" in said
    assert "unknown without torch" in said
