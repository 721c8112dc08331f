"""A live line about a training loop: steps, loss, tokens per second, time left. On a plain log, a line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["TrainingDisplay"]

_LINES = 6  # how many lines a plain log gets


class TrainingDisplay:
    """``with TrainingDisplay(console, steps) as display: ... display.advance(loss, tokens)``."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._started = time.monotonic()
        self.step = 0
        self.tokens = 0
        self._bar = Progress(
            TextColumn("Training  "),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, loss=float("nan"), speed=0.0)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """How long the training has taken."""
        return time.monotonic() - self._started

    def advance(self, loss: float, tokens: int) -> None:
        """Count one optimizer step of ``tokens`` real tokens."""
        self.step += 1
        self.tokens += tokens
        speed = self.tokens / max(self.seconds, 1e-9)
        self._bar.update(self._task, advance=1, loss=loss, speed=speed)
        if not self._console.is_terminal and self.step % max(1, self._steps // _LINES) == 0:
            left = (self._steps - self.step) * self.seconds / self.step
            line = (
                f"Training   step {self.step}/{self._steps}  loss {loss:.4f}  {speed:.0f} tokens/s  {left:.0f} s left"
            )
            self._console.print(line)
