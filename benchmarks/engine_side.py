"""The engine in this process, asked for the same pieces of work as the peers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import Cost, cost
from benchmarks.models import RANK
from tg_tinker.errors import TGTinkerError

if TYPE_CHECKING:
    from tg_tinker.engine.sampling.sampler import Sampler

_LEARNING_RATE = 1e-4


class EngineSide:
    """A base model, a run and a sampler; each call does one piece of work and tells its cost."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from tg_tinker.engine.lora.adapters import AdapterSpec
        from tg_tinker.engine.models import base_model
        from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
        from tg_tinker.engine.training.trainer import Trainer

        torch.set_num_threads(threads)
        self.base = base_model.load(str(folder), home=folder)
        spec = AdapterSpec(rank=RANK, alpha=2.0 * RANK)
        self.trainer = Trainer(self.base, spec, reduction="token_mean", seed=0)
        self.settings = OptimizerSettings(learning_rate=_LEARNING_RATE, grad_clip_norm=1.0)

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler of the model, made when it is first needed."""
        from tg_tinker.engine.sampling.sampler import Sampler

        return Sampler(self.base)

    def train(self, rows: int, length: int) -> Cost:
        """Forward and backward over ``rows`` sequences of ``length`` tokens, every one of them a label."""
        import numpy as np

        from tg_tinker.engine.training.batching import rows_from_batch
        from tg_tinker.types.batch import BatchData

        tokens = np.random.default_rng().integers(self.base.vocab_size, size=(rows, length))
        batch = BatchData(tokens)

        def work() -> None:
            for _ in self.trainer.forward_backward(rows_from_batch(batch)):
                pass

        return cost(work)

    def optim(self) -> Cost:
        """One optimizer step, clipping included."""
        return cost(lambda: self.trainer.optim_step(self.settings))

    def generate(self, streams: int, prompt: int, new: int) -> Cost:
        """Sample ``new`` tokens for each of ``streams`` different prompts with the run's adapter."""
        import numpy as np

        from tg_tinker.engine.sampling.generation import GenerationRequest

        tokens = np.random.default_rng().integers(300, self.base.vocab_size, size=(streams, prompt))
        adapter = self.trainer.snapshot()
        counter = _Counter()

        def work() -> None:
            for seed, row in enumerate(tokens.tolist()):
                request = GenerationRequest(prompt=tuple(row), adapter=adapter, max_tokens=new, seed=seed)
                self.sampler.submit(request, counter)
            while self.sampler.busy:
                self.sampler.step()

        spent = cost(work)
        # A random model may end a text early; what is compared is the cost of a token.
        share = counter.tokens / (streams * new)
        return Cost(spent.wall / share, spent.cpu / share)


class _Counter:
    """A listener that counts tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_token(self, token_id: int, logprob: float, text: str) -> None:  # noqa: ARG002
        """Count it."""
        self.tokens += 1

    def on_done(self, generation: object) -> None:
        """Nothing is left to be done."""

    def on_error(self, error: TGTinkerError) -> None:
        """A benchmark must not go on as if nothing had happened."""
        raise error
