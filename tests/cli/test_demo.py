"""The demo: it plays to the end on the tiny model, and it does not call a failure a success."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tg_tinker.cli import demo, lesson
from tg_tinker.types.results import Sample


def play(model: str = demo.SMOLLM2) -> tuple[demo._Demo, StringIO]:
    """Set up a demo that has not begun, and what it will have said."""
    said = StringIO()
    return demo._Demo(Console(file=said, width=200), model, epochs=8, seed=0), said


def answers(right: int) -> list[Sample]:
    """Answer the first ``right`` held-back questions and no other."""
    return [
        Sample(
            prompt=lesson.prompt(question.question),
            completion=f" It is {question.expect.upper()}." if index < right else " I cannot say.",
            num_tokens=4,
            finish_reason="stop",
            latency_ms=1.0,
        )
        for index, question in enumerate(lesson.held_back())
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_whole_demo_on_the_tiny_model(tmp_path: Path) -> None:
    """`tg-tinker demo --model tg-tinker/tiny` trains, saves, restores, and finds the same tokens again."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tg_tinker.cli", "demo", "--model", demo.TINY, "--epochs", "2"],
        capture_output=True,
        check=False,
        env=os.environ | {"TG_TINKER_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "12 steps" in result.stdout
    assert "sealed: AES256" in result.stdout.replace("-", "")
    assert "every token the same" in result.stdout
    assert str(tmp_path) in result.stdout


def test_a_model_that_answers_has_learnt() -> None:
    """Four in five held-back questions are enough."""
    played, _ = play()
    assert played._judge(demo.Outcome(3.0, 0.01, 1000, 10.0), answers(13))


def test_a_model_that_does_not_answer_has_failed() -> None:
    """A loss near zero is no excuse for wrong answers."""
    played, said = play()
    assert not played._judge(demo.Outcome(3.0, 0.01, 1000, 10.0), answers(12))
    assert "Failed" in said.getvalue()


def test_the_tiny_model_is_judged_by_its_loss() -> None:
    """Random weights cannot answer, and the demo says so; a loss that stands still is a failure all the same."""
    played, said = play(demo.TINY)
    assert played._judge(demo.Outcome(5.0, 2.0, 1000, 10.0), answers(0))
    assert not played._judge(demo.Outcome(5.0, 4.9, 1000, 10.0), answers(0))
    assert "random weights" in said.getvalue()


def test_the_plain_log_has_a_line_now_and_then() -> None:
    """Without a terminal the training display prints steps, loss, speed and time left, a few times in all."""
    said = StringIO()
    with demo.TrainingDisplay(Console(file=said, width=200), 48) as display:
        for _ in range(48):
            display.advance(0.5, 200)
    lines = said.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("Training   step 48/48  loss 0.5000")
    assert (display.step, display.tokens) == (48, 48 * 200)
