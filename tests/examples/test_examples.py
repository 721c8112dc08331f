"""Every script in ``examples/`` runs as a user would run it, on the built-in tiny model, in a home of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "private_finetune.py": ("--epsilon", "3.05"),
    "rl_custom_loss.py": (),
    "rl_dpo.py": (),
    "rl_off_policy.py": (),
    "rl_rollouts.py": (),
    "sft_blocking.py": ("--epochs", "1"),
    "web_backend.py": (),
}
LIMIT = 280.0  # seconds, for a machine that does much else

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Run = Callable[[str], str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run an example from a folder that is not the repository's; give what it prints."""

    def run(name: str) -> str:
        command = [sys.executable, "-W", "error", str(EXAMPLES / name), "--model", "tg-tinker/tiny", *ARGUMENTS[name]]
        own = {"TG_TINKER_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    return run


def test_every_example_is_run():
    """An example that is added is run here too."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


def test_reinforcement_learning_raises_the_reward(run):
    """The mean reward rises from under 0.2 to over 0.8, and the curve is drawn."""
    picture = EXAMPLES / "output" / "rl_rollouts.png"
    picture.unlink(missing_ok=True)
    found = re.search(r"mean reward ([\d.]+) -> ([\d.]+)", run("rl_rollouts.py"))
    assert found is not None
    first, last = map(float, found.groups())
    assert first < 0.2
    assert last > 0.8
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_off_policy_rewards_rise_on_older_samples(run):
    """While sampling goes on, the reward rises from under 0.2 to over 0.6; no sample is over two versions old."""
    picture = EXAMPLES / "output" / "rl_off_policy.png"
    picture.unlink(missing_ok=True)
    printed = run("rl_off_policy.py")
    found = re.search(r"mean reward ([\d.]+) -> ([\d.]+)$", printed, re.MULTILINE)
    assert found is not None
    assert float(found[1]) < 0.2
    assert float(found[2]) > 0.6
    assert 0.0 < max(map(float, re.findall(r"lag ([\d.]+)", printed))) <= 2.0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_loss_of_ones_own_raises_the_reward(run):
    """With GSPO, computed by the script itself, the reward rises from under 0.2 to over 0.6."""
    picture = EXAMPLES / "output" / "rl_custom_loss.png"
    picture.unlink(missing_ok=True)
    found = re.search(r"mean reward ([\d.]+) -> ([\d.]+)$", run("rl_custom_loss.py"), re.MULTILINE)
    assert found is not None
    assert float(found[1]) < 0.2
    assert float(found[2]) > 0.6
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_preferences_carry_over(run):
    """DPO starts at a margin of nothing, and ends with one of nats, on prompts that were held back, too."""
    picture = EXAMPLES / "output" / "rl_dpo.png"
    picture.unlink(missing_ok=True)
    number = r"(-?[\d.]+)"
    found = re.search(rf"mean margin {number} -> {number}, held back {number}, {number}\n", run("rl_dpo.py"))
    assert found is not None
    first, last, *unseen = map(float, found.groups())
    assert abs(first) < 0.05
    assert last > 10.0
    assert min(unseen) > 5.0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_supervised_fine_tuning_asks_and_saves(run):
    """The plain script trains, asks every held-back question, and saves a checkpoint."""
    printed = run("sft_blocking.py")
    questions = (EXAMPLES / "data" / "marrowick_held_back.jsonl").read_text(encoding="utf-8").splitlines()
    assert "epoch 1 of 1: step " in printed
    assert len(re.findall(r"^(?:right|wrong): ", printed, re.MULTILINE)) == len(questions)
    assert "saved as bt://loops:" in printed


def test_web_backend_streams_while_it_trains(run):
    """Completions arrive in pieces, and the training is further on after them than before."""
    printed = run("web_backend.py")
    steps = re.search(r"from step (\d+) to step (\d+)", printed)
    assert steps is not None
    assert int(steps[2]) > int(steps[1]) >= 1
    assert max(map(int, re.findall(r"read (\d+) pieces", printed))) > 1


def test_private_fine_tuning_stops_at_its_budget(run):
    """Training ends cleanly within the budget, the state is saved, and the curve of ε is drawn."""
    picture = EXAMPLES / "output" / "private_finetune.png"
    picture.unlink(missing_ok=True)
    printed = run("private_finetune.py")
    found = re.search(r"(\d+) steps at epsilon ([\d.]+) of 3\.05, per one row of a batch", printed)
    assert found is not None
    assert int(found[1]) == 8
    assert 2.9 < float(found[2]) <= 3.05
    assert "nothing was changed" in printed
    assert re.search(r"saved as art-[0-9a-f]{32}$", printed, re.MULTILINE)
    assert picture.read_bytes().startswith(b"\x89PNG")
