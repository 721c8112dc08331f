"""Private training on the tiny model: against gradients taken one example at a time, and against an attacker."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from tg_tinker.engine import base_model
from tg_tinker.engine.adapters import AdapterSpec
from tg_tinker.engine.base_model import BaseModel
from tg_tinker.engine.batching import Row
from tg_tinker.engine.optim import OptimizerSettings
from tg_tinker.engine.trainer import PassOutput, StepOutput, Steps, Trainer, TrainerState
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, OperationFailedError, TGTinkerError
from tg_tinker.privacy.accountant import Mechanism, spent
from tg_tinker.privacy.ledger import Ledger
from tg_tinker.privacy.policy import RunPrivacy
from tg_tinker.privacy.settings import PrivacySettings
from tg_tinker.server.private import PrivateTraining
from tg_tinker.types.config import DPConfig
from tg_tinker.types.results import DPMetrics

SGD = OptimizerSettings(name="sgd", learning_rate=1.0)
LENGTHS = (5, 9, 12, 3, 7, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Load the tiny model in double precision."""
    home = tmp_path_factory.mktemp("home")
    return base_model.load("tg-tinker/tiny", home=home, device="cpu", dtype="float64")


def make_rows(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[Row]:
    """Draw rows of different lengths; each row's first label is ignored."""
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        tokens = random.integers(0, 256, length)
        targets = np.concatenate([tokens[1:], [-100]])
        targets[0] = -100
        rows.append(Row(tokens, targets))
    return rows


def make_trainer(base: BaseModel, **options: Any) -> Trainer:
    """Make a trainer whose adapter is not zero anywhere."""
    spec = AdapterSpec(rank=4, alpha=8.0, dropout=options.pop("dropout", 0.0), seed=1)
    trainer = Trainer(base, spec, reduction=options.pop("reduction", "token_mean"), seed=5, **options)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainer.adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random, dtype=parameter.dtype), alpha=0.05)
    return trainer


class Private:
    """Passes and steps of a private run, as the server takes them."""

    def __init__(self, trainer: Trainer, folder: Path, lineage: str = "run-1", **fields: Any) -> None:
        config = DPConfig(**{"max_grad_norm": 0.05, "target_epsilon": None, "expected_batch_size": 4, **fields})
        settings = PrivacySettings.of(config, default_batch_size=None)
        self.trainer = trainer
        self.privacy = RunPrivacy(settings, Ledger(folder, lineage), bytes(32))
        self.joined = PrivateTraining(self.privacy, "one row of a batch")
        self.joined.attach(trainer)

    def forward_backward(self, rows: list[Row], loss_fn: str = "cross_entropy") -> PassOutput:
        """Admit the rows and run the pass."""
        self.joined.admit(rows, loss_fn, step=self.trainer.step + 1)
        try:
            return finish(self.trainer.forward_backward(rows, loss_fn))
        except TGTinkerError:
            self.joined.discard()
            raise

    def optim_step(self) -> tuple[StepOutput, DPMetrics]:
        """Release the gradient and step with it."""
        metrics = self.joined.release(self.trainer, noise=True)
        return self.trainer.optim_step(SGD), metrics

    def load(self, state: tuple[TrainerState, dict[str, Any]]) -> bool:
        """Go back to a state; say whether its step in progress can be gone on with."""
        going_on = self.joined.restore(state[1], with_step=True)
        self.trainer.load(state[0], with_optimizer=True)
        if not going_on:
            self.trainer.discard_gradients()
        return going_on

    def state(self) -> tuple[TrainerState, dict[str, Any]]:
        """Copy everything."""
        return self.trainer.state(), self.joined.state()


def finish(steps: Steps[Any]) -> Any:
    """Run an operation to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def gradient(trainer: Trainer) -> Tensor:
    """Give the accumulated gradient as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in trainer.adapter.parameters()])


def one_by_one(base: BaseModel, rows: list[Row], norm: float, **options: Any) -> tuple[Tensor, list[float]]:
    """Clip by the book: a plain pass per row, its gradient divided by its label tokens, scaled, added."""
    total, norms = None, []
    for row in rows:
        trainer = make_trainer(base, reduction="sum", **options)
        finish(trainer.forward_backward([row]))
        single = gradient(trainer) / int((row.targets != -100).sum())
        norms.append(float(single.norm()))
        clipped = single * min(1.0, norm / norms[-1])
        total = clipped if total is None else total + clipped
    assert total is not None
    return total, norms


def everything(private: Private, folder: Path) -> str:
    """Hash all there is: adapter, gradient, moments, counters, privacy state, ledger files."""
    state, privacy = private.state()
    digest = hashlib.sha256(repr((sorted(state.counters.items()), privacy)).encode())
    for name, tensor in sorted(state.tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for path in sorted(folder.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("micro_batch_tokens", [4096, 24])
def test_clipped_sums_equal_clipping_one_by_one(base: BaseModel, tmp_path: Path, micro_batch_tokens: int) -> None:
    """Whatever the micro-batches, the accumulator holds the sum of each row's clipped mean-loss gradient."""
    rows = make_rows()
    bound = float(np.median(one_by_one(base, rows, norm=1.0)[1]))
    expected, norms = one_by_one(base, rows, norm=bound)
    private = Private(make_trainer(base, micro_batch_tokens=micro_batch_tokens), tmp_path, max_grad_norm=bound)
    output = private.forward_backward(rows)
    assert torch.allclose(gradient(private.trainer), expected, rtol=0, atol=1e-12)
    metrics = private.optim_step()[1]
    assert metrics.num_clipped == 3
    assert metrics.grad_norm_before_clip == pytest.approx(np.mean(norms))
    assert metrics.grad_norm_after_clip == pytest.approx(np.minimum(norms, bound).mean())
    assert output.num_tokens == sum(LENGTHS) - 2 * len(LENGTHS)


def test_splitting_a_batch_over_calls_changes_nothing(base: BaseModel, tmp_path: Path) -> None:
    """One pass over six rows, or three over parts of them: the same accumulator within 1e-12."""
    rows = make_rows()
    sums = []
    for number, cuts in enumerate(([0, 6], [0, 1, 4, 6], [0, 3, 6])):
        private = Private(make_trainer(base), tmp_path, f"run-{number}")
        for start, stop in itertools.pairwise(cuts):
            private.forward_backward(rows[start:stop])
        sums.append(gradient(private.trainer))
    for other in sums[1:]:
        assert torch.allclose(other, sums[0], rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_nothing(base: BaseModel, tmp_path: Path) -> None:
    """Layers that run forward twice are recorded once: the same sums, with dropout too."""
    sums = []
    for number, checkpointing in enumerate((False, True)):
        trainer = make_trainer(base, dropout=0.2, gradient_checkpointing=checkpointing)
        private = Private(trainer, tmp_path, f"run-{number}")
        private.forward_backward(make_rows())
        sums.append(gradient(trainer))
    assert torch.allclose(sums[0], sums[1], rtol=0, atol=1e-12)


def test_dropout_is_part_of_what_is_clipped(base: BaseModel, tmp_path: Path) -> None:
    """With dropout a row's gradient is that of a plain pass with the same mask."""
    rows = make_rows(lengths=(9,))
    expected, _ = one_by_one(base, rows, norm=0.05, dropout=0.3)
    private = Private(make_trainer(base, dropout=0.3), tmp_path)
    private.forward_backward(rows)
    assert torch.allclose(gradient(private.trainer), expected, rtol=0, atol=1e-12)


def test_a_step_is_noise_on_the_sum_over_the_public_size(base: BaseModel, tmp_path: Path) -> None:
    """The update is lr * (sum + σC noise) / B: its deviation from the plain sum has the promised spread."""
    trainer = make_trainer(base)
    private = Private(trainer, tmp_path, noise_multiplier=3.0)
    private.forward_backward(make_rows())
    total = gradient(trainer)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in trainer.adapter.parameters()])
    step, metrics = private.optim_step()
    after = torch.cat([parameter.detach().flatten() for parameter in trainer.adapter.parameters()])
    noise = (before - after) * 4 - total
    assert float(noise.std()) == pytest.approx(0.15, rel=5 / np.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < 5 * 0.15 / np.sqrt(len(noise))
    assert (step.step, metrics.noise_applied) == (1, True)
    assert step.grad_norm == pytest.approx(float((before - after).norm()))


def test_an_empty_draw_still_steps(base: BaseModel, tmp_path: Path) -> None:
    """Without any example the step is noise alone: the adapter moves and ε grows."""
    trainer = make_trainer(base)
    private = Private(trainer, tmp_path)
    before = trainer.snapshot().named()
    step, metrics = private.optim_step()
    after = trainer.snapshot().named()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert step.step == 1
    assert metrics.total_epsilon == spent({Mechanism(1.0, 1.0): 1}, 1e-5).epsilon


def test_an_exhausted_budget_changes_nothing(base: BaseModel, tmp_path: Path) -> None:
    """When the next step would pass the target, pass and step are refused with all state as before; saving works."""
    private = Private(make_trainer(base), tmp_path, target_epsilon=6.0)
    private.forward_backward(make_rows())
    private.optim_step()
    before = everything(private, tmp_path)
    with pytest.raises(DPBudgetExceededError):
        private.forward_backward(make_rows(1))
    with pytest.raises(DPBudgetExceededError):
        private.optim_step()
    assert everything(private, tmp_path) == before
    assert private.trainer.step == 1
    finish(private.trainer.forward(make_rows(2)))
    assert len(private.state()[1]["ledger"]) == 1


def test_a_replayed_step_is_equal_and_free(base: BaseModel, tmp_path: Path) -> None:
    """Going back to a checkpoint and repeating the same step gives the same bits and costs nothing more."""
    private = Private(make_trainer(base), tmp_path)
    start = private.state()
    results = []
    for _ in range(2):
        private.load(start)
        private.forward_backward(make_rows())
        _, metrics = private.optim_step()
        results.append((private.trainer.snapshot().named(), metrics.total_epsilon))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])


def test_other_data_at_the_same_step_is_charged_again(base: BaseModel, tmp_path: Path) -> None:
    """Going back to a checkpoint and taking the step with other rows is another release."""
    private = Private(make_trainer(base), tmp_path)
    start = private.state()
    for seed in (0, 1):
        private.load(start)
        private.forward_backward(make_rows(seed))
        private.optim_step()
    assert private.privacy.spent() == spent({Mechanism(1.0, 1.0): 2}, 1e-5)


def test_a_gradient_in_progress_survives_a_checkpoint(base: BaseModel, tmp_path: Path) -> None:
    """Saved between pass and step, the clipped sums and their examples come back on another run."""
    rows = make_rows()
    private = Private(make_trainer(base), tmp_path)
    private.forward_backward(rows)
    new = Private(make_trainer(base), tmp_path, "run-2")
    assert new.load(private.state())
    assert torch.equal(gradient(new.trainer), gradient(private.trainer))
    with pytest.raises(InvalidRequestError):
        new.forward_backward(rows[:1])
    assert new.optim_step()[1].num_clipped == 6


@pytest.mark.parametrize("norm", [0.01, None])
def test_a_gradient_that_was_clipped_otherwise_is_dropped(base: BaseModel, tmp_path: Path, norm: float | None) -> None:
    """A saved gradient that was clipped to another norm, or not at all, is dropped: it would break the promise."""
    trainer = make_trainer(base)
    if norm is None:
        finish(trainer.forward_backward(make_rows()))
        state: tuple[TrainerState, dict[str, Any]] = (trainer.state(), {"ledger": []})
    else:
        source = Private(trainer, tmp_path, "run-0", max_grad_norm=norm)
        source.forward_backward(make_rows())
        state = source.state()
    private = Private(make_trainer(base), tmp_path)
    assert not private.load(state)
    assert not private.privacy.state()["examples"]
    assert all(parameter.grad is None for parameter in private.trainer.adapter.parameters())


def test_a_failed_pass_drops_its_examples(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure on the device gradient and examples are gone, and the same rows may come again."""
    private = Private(make_trainer(base), tmp_path)
    private.forward_backward(make_rows(1))
    with monkeypatch.context() as patch:
        patch.setattr("tg_tinker.privacy.clipping.example_gradients", None)
        with pytest.raises(OperationFailedError):
            private.forward_backward(make_rows())
    assert not private.privacy.state()["examples"]
    private.forward_backward(make_rows())
    assert len(private.privacy.state()["examples"]) == 6


def test_losses_that_couple_examples_are_refused(base: BaseModel, tmp_path: Path) -> None:
    """A loss over pairs cannot be clipped example by example."""
    private = Private(make_trainer(base), tmp_path)
    with pytest.raises(InvalidRequestError) as caught:
        private.forward_backward(make_rows(), "dpo")
    assert caught.value.field == "loss_fn"
    assert not private.privacy.state()["examples"]


def test_hashes_are_keyed(base: BaseModel, tmp_path: Path) -> None:
    """The gradient hash under DP is an HMAC that differs from run to run for equal gradients."""
    hashes = []
    for lineage in ("run-1", "run-2"):
        private = Private(make_trainer(base), tmp_path, lineage)
        private.forward_backward(make_rows())
        hashes.append(private.joined.gradient_hash(private.trainer))
    assert hashes[0] != hashes[1]
    assert all(value.startswith("hmac-sha256:") for value in hashes)


# an attacker


@attrs.frozen
class Attack:
    """Scores of an attacker who knows everything but whether the canary was there."""

    absent: list[float]
    present: list[float]

    def epsilon_lower_bound(self, delta: float) -> float:
        """Bound ε from below with 95 % confidence: best threshold, Clopper-Pearson at 97.5 % on either rate."""
        from scipy.stats import beta

        best = 0.0
        n, m = len(self.absent), len(self.present)
        for threshold in (*self.absent, *self.present):
            hits = sum(score >= threshold for score in self.present)
            alarms = sum(score >= threshold for score in self.absent)
            low = beta.ppf(0.025, hits, m - hits + 1) if hits else 0.0
            high = beta.ppf(0.975, alarms + 1, n - alarms) if alarms < n else 1.0
            if low > delta:
                best = max(best, float(np.log((low - delta) / high)))
        return best


def attack(base: BaseModel, folder: Path, runs: int, *, sigma: float, clipping: bool) -> Attack:
    """Train tiny runs with and without a canary, and score each by its update's share along the canary's gradient."""
    canary = make_rows(99, (12,))
    others = make_rows(0, (6, 8, 10))
    scores: dict[bool, list[float]] = {False: [], True: []}
    direction = one_by_one(base, canary, norm=1.0)[0]
    for number in range(runs):
        present = number % 2 == 1
        trainer = make_trainer(base)
        private = Private(trainer, folder, f"attack-{number}", noise_multiplier=sigma)
        private.privacy._secret = number.to_bytes(32, "little")
        if not clipping:
            recorder = trainer.per_example

            def unclipped(batch: Any, recorder: Any = recorder) -> Any:
                made = recorder(batch)
                made._clipper._max_grad_norm = 1e9
                return made

            trainer.per_example = unclipped
        before = torch.cat([parameter.detach().flatten().clone() for parameter in trainer.adapter.parameters()])
        private.forward_backward([*others, *canary] if present else others)
        private.optim_step()
        after = torch.cat([parameter.detach().flatten() for parameter in trainer.adapter.parameters()])
        scores[present].append(float((before - after) @ direction))
    return Attack(scores[False], scores[True])


def test_membership_cannot_be_told_beyond_epsilon(base: BaseModel, tmp_path: Path) -> None:
    """At reported ε about 1, forty runs with and without a canary give a lower bound below the reported ε."""
    sigma = 3.73
    epsilon = spent({Mechanism(sigma, 1.0): 1}, 1e-5).epsilon
    assert 0.9 < epsilon < 1.1
    outcome = attack(base, tmp_path, 40, sigma=sigma, clipping=True)
    assert outcome.epsilon_lower_bound(1e-5) < epsilon


def test_without_clipping_the_canary_shows(base: BaseModel, tmp_path: Path) -> None:
    """The same experiment with clipping switched off finds the leak: the lower bound passes the reported ε."""
    outcome = attack(base, tmp_path, 40, sigma=3.73, clipping=False)
    assert outcome.epsilon_lower_bound(1e-5) > spent({Mechanism(3.73, 1.0): 1}, 1e-5).epsilon
