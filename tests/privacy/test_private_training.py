"""Private training on the tiny model, against gradients taken one example at a time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from fixtures.private_runs import (
    LENGTHS,
    Private,
    everything,
    finish,
    gradient,
    make_rows,
    make_trainer,
    one_by_one,
    ticket,
)

from tg_tinker.engine.models.base_model import BaseModel
from tg_tinker.engine.training.batching import Row
from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
from tg_tinker.engine.training.trainer import TrainerState
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, OperationFailedError
from tg_tinker.privacy.accountant import Mechanism, spent
from tg_tinker.server.work.operations import Offline


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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_splitting_a_batch_over_calls_changes_nothing(base: BaseModel, tmp_path: Path, dropout: float) -> None:
    """One pass over six rows, or three over parts of them: the same accumulator within 1e-12, with dropout too."""
    rows = make_rows()
    sums = []
    for number, cuts in enumerate(([0, 6], [0, 1, 4, 6], [0, 3, 6])):
        private = Private(make_trainer(base, dropout=dropout), tmp_path, f"run-{number}")
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


def test_dropout_is_part_of_what_is_clipped(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, in a model's first pass too, a row's gradient is that of a plain pass over it alone."""
    rows = make_rows()
    monkeypatch.setattr("tg_tinker.engine.training.forward._PLAIN_HEAD", WeakKeyDictionary())
    expected, _ = one_by_one(base, rows, norm=0.05, dropout=0.3)
    assert not torch.allclose(expected, one_by_one(base, rows, norm=0.05)[0], rtol=1e-3)
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


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSettings(schedule="cosine"),  # a schedule without an end
        OptimizerSettings(schedule="cosine", total_steps=9, schedule_kwargs={"num_cycles": 1e308}),  # not computable
    ],
    ids=["no end", "no number"],
)
def test_a_step_without_a_learning_rate_changes_nothing(
    base: BaseModel, tmp_path: Path, optimizer: OptimizerSettings
) -> None:
    """Such a step is refused before the release: no noise, no charge, all state as before, and a good step follows."""
    private, other = Private(make_trainer(base), tmp_path / "a"), Private(make_trainer(base), tmp_path / "b")
    for run in (private, other):
        run.forward_backward(make_rows())
        run.optim_step()
        run.forward_backward(make_rows(1))
    before = everything(private, tmp_path / "a")
    with pytest.raises(ValueError, match=r"schedule|domain"):
        private.optim_step(optimizer)
    assert everything(private, tmp_path / "a") == before
    assert private.run.status == "active"
    assert private.optim_step() == other.optim_step()


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


def test_a_pass_that_is_stopped_while_it_is_priced_spoils_the_step_behind_it(base: BaseModel, tmp_path: Path) -> None:
    """A pass cancelled while its cost is computed elsewhere adds nothing, and no step is taken as if it had."""
    private = Private(make_trainer(base), tmp_path, accountant_type="prv", sample_rate=0.5)
    step = ticket("optim_step")
    stopped = ticket("forward_backward")
    steps = private.run.train(stopped, make_rows)
    assert isinstance(next(steps), Offline)
    steps.close()
    step.accepted = stopped.accepted + 1.0
    with pytest.raises(OperationFailedError, match=stopped.id):
        private.run.check_gradients(step)
    assert not private.privacy.state()["examples"]


def test_losses_that_couple_examples_are_refused(base: BaseModel, tmp_path: Path) -> None:
    """A loss over pairs cannot be clipped example by example."""
    private = Private(make_trainer(base), tmp_path)
    with pytest.raises(InvalidRequestError) as caught:
        private.forward_backward(make_rows(), "dpo")
    assert caught.value.field == "loss_fn"
    assert not private.privacy.state()["examples"]


def test_losses_that_are_not_means_are_refused(base: BaseModel, tmp_path: Path) -> None:
    """A sum over tokens, which losses of the caller's own are sent as, is no mean: refused, never quietly divided."""
    private = Private(make_trainer(base), tmp_path)
    with pytest.raises(InvalidRequestError, match="forward_backward_custom") as caught:
        private.forward_backward(make_rows(), config={"skip_token_normalization": True})
    assert caught.value.field == "loss_fn_config.skip_token_normalization"
    assert not private.privacy.state()["examples"]
    private.forward_backward(make_rows(), config={"skip_token_normalization": False})


def rewarded(row: Row, **inputs: Any) -> Row:
    """Give a row what a policy loss reads: weights for all, log probabilities and advantages where it has labels."""
    length = len(row.tokens)
    given = {"logprobs": np.full(length, -1.0), "advantages": np.ones(length), **inputs}
    return Row(row.tokens, row.targets, given)


@pytest.mark.parametrize(
    ("inputs", "loss_fn"),
    [
        ({"ref_logprobs": np.zeros(9)}, "importance_sampling"),
        ({"weights": np.ones(9, np.float32)}, "importance_sampling"),
        ({"temperatures": np.ones(9, np.int64)}, "importance_sampling"),
        ({"logprobs": np.append(np.full(8, -1.0), 7.0)}, "importance_sampling"),
        ({"advantages": np.zeros(9)}, "cross_entropy"),
    ],
    ids=["unread column", "weights of one", "temperatures of one", "value without a label", "unread by this loss"],
)
def test_what_the_loss_ignores_makes_no_other_example(
    base: BaseModel, tmp_path: Path, inputs: dict[str, Any], loss_fn: str
) -> None:
    """An example that comes again with another value of what its loss does not read is the same example."""
    (row,) = make_rows(lengths=(9,))
    private = Private(make_trainer(base), tmp_path)
    private.forward_backward([rewarded(row)], loss_fn)
    with pytest.raises(InvalidRequestError) as caught:
        private.forward_backward([rewarded(row, **inputs)], loss_fn)
    assert caught.value.field == "batch[0]"


@pytest.mark.parametrize("name", ["weights", "temperatures", "logprobs", "advantages"])
def test_what_the_loss_reads_makes_another_example(base: BaseModel, tmp_path: Path, name: str) -> None:
    """The same tokens with another reward, say, are another example."""
    (row,) = make_rows(lengths=(9,))
    private = Private(make_trainer(base), tmp_path)
    private.forward_backward([rewarded(row)], "importance_sampling")
    private.forward_backward([rewarded(row, **{name: np.full(9, 0.5)})], "importance_sampling")
    assert len(private.privacy.state()["examples"]) == 2


def test_an_unknown_loss_is_refused_by_name(base: BaseModel, tmp_path: Path) -> None:
    """A loss that does not exist is named before anything is noted."""
    private = Private(make_trainer(base), tmp_path)
    with pytest.raises(InvalidRequestError) as caught:
        private.forward_backward(make_rows(), "hinge")
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
