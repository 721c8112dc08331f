"""What clipping by example costs: forward and backward of a private run beside those of a plain one, in this process.

A random Llama of a GPT's proportions (8 layers, hidden size 320, 11.6 million parameters), LoRA rank 8 on every linear
layer, 16 x 256 tokens in one micro-batch. Noise and accounting come once a step, and are measured beside it.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Figure, Goal
from benchmarks.measure import Cost, Options, cost, interleaved
from benchmarks.models import RANK, VOCABULARY, make_gpt

if TYPE_CHECKING:
    from tg_tinker.engine.training.trainer import Trainer
    from tg_tinker.server.training.private import PrivateTraining

_SHAPE, _QUICK_SHAPE = (16, 256), (4, 64)  # rows, tokens


def run(options: Options) -> list[Figure]:
    """Take turns between the plain and the private run on one base model."""
    shape = _QUICK_SHAPE if options.quick else _SHAPE
    with TemporaryDirectory() as scratch:
        plain, private = _Side(scratch, shape, options.threads), _Side(scratch, shape, options.threads, private=True)
        sides = {"private": private.forward_backward, "plain": plain.forward_backward}
        taken = interleaved(sides, options.rounds(9), warm_up=2)
        releases = [private.release() for _ in range(options.rounds(9) + 1)][1:]
    return [*_compared(shape, taken, options), _released(releases)]


class _Side:
    """One run; both sides make the same base model of the same seed."""

    def __init__(self, scratch: str, shape: tuple[int, int], threads: int, *, private: bool = False) -> None:
        import torch

        from tg_tinker.engine.lora.adapters import AdapterSpec
        from tg_tinker.engine.models import base_model
        from tg_tinker.engine.training.trainer import Trainer

        torch.set_num_threads(threads)
        folder = make_gpt(Path(scratch) / ("private" if private else "plain"))
        self.shape = shape
        spec = AdapterSpec(rank=RANK, alpha=2.0 * RANK)
        base = base_model.load(str(folder), home=folder, device="cpu", dtype="float32")
        self.trainer = Trainer(base, spec, reduction="label_mean", seed=0, micro_batch_tokens=shape[0] * shape[1])
        self.privacy = _private(self.trainer, folder, shape[0]) if private else None

    def forward_backward(self) -> Cost:
        """Pass over random rows, every token of them a label."""
        rows = self._rows()

        def work() -> None:
            if self.privacy is not None:
                self.privacy.admit(rows, "cross_entropy", None, step=self.trainer.step + 1)
            for _ in self.trainer.forward_backward(rows):
                pass

        spent = cost(work)
        self.trainer.discard_gradients()
        if self.privacy is not None:
            self.privacy.discard()
        return spent

    def release(self) -> Cost:
        """Draw the noise of a step and account for it, durably."""
        privacy = self.privacy
        assert privacy is not None
        spent = cost(lambda: privacy.release(self.trainer, noise=True))
        self.trainer.discard_gradients()
        self.trainer.step += 1
        return spent

    def _rows(self) -> list[Any]:
        import numpy as np

        from tg_tinker.engine.training.batching import rows_from_batch
        from tg_tinker.types.batch import BatchData

        return rows_from_batch(BatchData(np.random.default_rng().integers(VOCABULARY, size=self.shape)))


def _private(trainer: Trainer, home: Path, batch_size: int) -> PrivateTraining:
    from tg_tinker.server.training.private import PrivateTraining
    from tg_tinker.types.config import DPConfig

    config = DPConfig(target_epsilon=None, sample_rate=0.01)
    privacy = PrivateTraining.open(config, run_id="run", home=home, default_batch_size=batch_size, unit="one row")
    privacy.attach(trainer)
    return privacy


def _compared(shape: tuple[int, int], taken: dict[str, list[Cost]], options: Options) -> list[Figure]:
    goal = None if options.quick else Goal("<=", 1.15, "ratio")
    return [
        Figure(
            name=f"private forward_backward {shape[0]} x {shape[1]}{suffix}",
            unit=unit,
            ours=[getattr(one, clock) for one in taken["private"]],
            peer="without privacy",
            theirs=[getattr(one, clock) for one in taken["plain"]],
            goal=goal,
        )
        for clock, suffix, unit in (("wall", "", "s"), ("cpu", ", CPU", "CPU s"))
    ]


def _released(taken: list[Cost]) -> Figure:
    return Figure(name="noise and accounting of a step", unit="ms", ours=[1000 * one.wall for one in taken])
