"""Training passes against the model's own loss and against peft, and what a run may rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures.peft_oracle import peft_gradients, peft_model
from fixtures.training import drive, gradients, random_rows, trainer

from tg_tinker.engine.lora.adapters import AdapterSpec, active
from tg_tinker.engine.training.batching import Row, rows_from_batch
from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.batch import BatchData

ADAM = OptimizerSettings(learning_rate=1e-2)
RL_INPUTS = ("logprobs", "advantages")


def padded(side: str) -> dict[str, np.ndarray]:
    """Three texts of different lengths as a padded batch, some labels ignored."""
    rng = np.random.default_rng(4)
    lengths, width = (17, 9, 30), 30
    ids, mask = np.full((3, width), 258), np.zeros((3, width), np.int64)
    labels = np.full((3, width), -100)
    for index, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(length)
        row = rng.integers(0, 256, length)
        ids[index, place], mask[index, place] = row, 1
        labels[index, place] = np.where(np.arange(length) < 4, -100, row)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_models_own(side: str) -> None:
    """On padded batches of either side, loss and count are those of the HF model with the same labels."""
    batch = padded(side)
    run = trainer(reduction="label_mean")
    output = drive(run.forward(rows_from_batch(BatchData(**batch))))
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    positions = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with active(run.base, run.adapter), torch.no_grad():
        expected = run.base.model(**tensors, position_ids=positions).loss
    assert output.loss == pytest.approx(float(expected), rel=1e-5)
    assert output.num_tokens == int((batch["labels"][:, 1:] != -100).sum())
    assert output.loss_sum == pytest.approx(output.loss * output.num_tokens)


def test_left_and_right_padding_are_the_same_request() -> None:
    """The side of the padding changes neither loss nor gradient, not by a bit."""
    left, right = trainer(), trainer()
    losses = [
        drive(run.forward_backward(rows_from_batch(BatchData(**padded(side))))).loss
        for run, side in ((left, "left"), (right, "right"))
    ]
    assert losses[0] == losses[1]
    assert left.gradient_hash() == right.gradient_hash()


@pytest.mark.parametrize("micro_batch_tokens", [None, 40])
def test_gradients_are_those_of_peft(micro_batch_tokens: int | None) -> None:
    """The summed gradient of a padded batch equals autograd through peft's own model, times the number of labels."""
    batch = padded("right")
    run = trainer(spec=AdapterSpec(rank=4, alpha=12.0), micro_batch_tokens=micro_batch_tokens)
    oracle = peft_model(run.adapter)
    output = drive(run.forward_backward(rows_from_batch(BatchData(**batch))))
    (oracle(**{name: torch.from_numpy(values) for name, values in batch.items()}).loss * output.num_tokens).backward()
    theirs = peft_gradients(oracle)
    for name, gradient in gradients(run).items():
        wanted = theirs[name.removeprefix("grad.")]
        torch.testing.assert_close(gradient, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)


def test_logprobs_are_those_of_each_target() -> None:
    """Every target's logprob is returned at its position, 0.0 where there is no target, whatever the micro-batches."""
    run, rows = trainer(micro_batch_tokens=32), random_rows(5, 31, 12, 12)
    found = drive(run.forward(rows)).logprobs
    for row, logprobs in zip(rows, found, strict=True):
        with active(run.base, run.adapter), torch.no_grad():
            logits = run.base.model(torch.from_numpy(row.tokens)[None]).logits[0]
        expected = logits.log_softmax(-1)[torch.arange(len(row.tokens) - 1), torch.from_numpy(row.targets[:-1])]
        assert logprobs.dtype == np.float32
        assert logprobs[-1] == 0.0
        np.testing.assert_allclose(logprobs[:-1], expected.numpy(), atol=2e-5)


def test_several_targets_per_position() -> None:
    """(N, K) targets and weights give the weighted sum of all of them, in value and gradient, and (N, K) logprobs."""
    tokens = np.arange(10)
    targets = np.stack([np.roll(tokens, -1), tokens + 50], axis=1)
    targets[-1], targets[3, 1] = -100, -100
    weights = np.random.default_rng(0).random((10, 2))
    both, one, other = trainer(reduction="sum"), trainer(reduction="sum"), trainer(reduction="sum")
    output = drive(both.forward_backward([Row(tokens, targets, {"weights": weights})]))
    parts = [
        drive(run.forward_backward([Row(tokens, targets[:, k], {"weights": weights[:, k]})]))
        for k, run in ((0, one), (1, other))
    ]
    assert output.loss == pytest.approx(sum(part.loss for part in parts), rel=1e-5)
    assert output.num_tokens == 9
    assert output.logprobs[0].shape == (10, 2)
    assert not output.logprobs[0][3, 1]
    np.testing.assert_allclose(output.logprobs[0], np.stack([part.logprobs[0] for part in parts], 1), atol=1e-5)
    second = gradients(other)
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradient + second[name], gradients(both)[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "ppo"])
def test_splitting_a_batch_over_calls_changes_nothing(loss_fn: str) -> None:
    """Gradient, step and grad norm of two calls are those of one call, to rounding: the division waits for the step."""
    whole, split = trainer(), trainer()
    rows = random_rows(40, 7, 22, 31, 18, inputs=RL_INPUTS)
    output = drive(whole.forward_backward(rows, loss_fn))
    parts = [drive(split.forward_backward(part, loss_fn)) for part in (rows[:1], rows[1:])]
    assert sum(part.loss_sum for part in parts) == pytest.approx(output.loss_sum, rel=1e-5)
    assert sum(part.num_tokens for part in parts) == output.num_tokens
    first, second = whole.optim_step(ADAM), split.optim_step(ADAM)
    assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)
    for one, other in zip(whole.adapter.parameters(), split.adapter.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("reduction", "divided"), [("token_mean", True), ("label_mean", True), ("sum", False)])
def test_the_reduction_of_a_run(reduction: str, divided) -> None:
    """Mean runs report and step with means over active tokens, sum runs with sums."""
    run = trainer(reduction=reduction)
    output = drive(run.forward_backward(random_rows(12, 20)))
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients(run).values()]))
    count = output.num_tokens if divided else 1
    assert output.num_tokens == 30
    assert output.loss == pytest.approx(output.loss_sum / count)
    assert output.metrics["loss:sum"] == output.loss_sum
    assert run.optim_step(ADAM).grad_norm == pytest.approx(float(norm) / count, rel=1e-5)


def test_skipping_the_normalisation() -> None:
    """With skip_token_normalization the pass is a plain sum, says so, and steps with the sum."""
    run, plain = trainer(), trainer(reduction="sum")
    output = drive(run.forward_backward(random_rows(12), config={"skip_token_normalization": True}))
    drive(plain.forward_backward(random_rows(12)))
    assert output.metrics["skip_token_normalization"] == 1.0
    assert output.loss == output.loss_sum
    assert run.optim_step(ADAM).grad_norm == plain.optim_step(ADAM).grad_norm


@pytest.mark.parametrize("first", [True, False])
def test_normalised_and_plain_gradients_share_no_step(first) -> None:
    """Mixing the two in one optimizer step is refused; after the failure the run starts anew and is usable."""
    run = trainer()
    drive(run.forward_backward(random_rows(12), config={"skip_token_normalization": first}))
    with pytest.raises(InvalidRequestError) as caught:
        drive(run.forward_backward(random_rows(12), config={"skip_token_normalization": not first}))
    assert caught.value.field == "loss_fn_config.skip_token_normalization"
    drive(run.forward_backward(random_rows(12), config={"skip_token_normalization": not first}))
    assert run.optim_step(ADAM).step == 1


def test_runs_on_one_base_do_not_disturb_each_other() -> None:
    """Two runs interleaved between micro-batches give, bit for bit, what each gives alone."""
    spec = AdapterSpec(rank=4, alpha=8.0, dropout=0.1)
    alone = []
    for seed in (1, 2):
        run = trainer(spec=spec, seed=seed, micro_batch_tokens=64)
        drive(run.forward_backward(random_rows(50, 30, 20, seed=seed)))
        alone.append((run.gradient_hash(), run))
    one, two = (trainer(spec=spec, seed=seed, micro_batch_tokens=64) for seed in (1, 2))
    other = two.forward_backward(random_rows(50, 30, 20, seed=2))
    drive(one.forward_backward(random_rows(50, 30, 20, seed=1)), lambda: next(other))
    drive(other)
    assert [one.gradient_hash(), two.gradient_hash()] == [digest for digest, _ in alone]


def test_forward_touches_nothing() -> None:
    """An evaluation draws no dropout, leaves the gathered gradient and the counters as they are, and repeats itself."""
    run = trainer(spec=AdapterSpec(rank=4, alpha=8.0, dropout=0.5))
    drive(run.forward_backward(random_rows(20)))
    before, counter = run.gradient_hash(), run.dropout_counter
    first, second = (drive(run.forward(random_rows(20, 8))) for _ in range(2))
    assert first.loss == second.loss
    assert (run.gradient_hash(), run.dropout_counter) == (before, counter)
    assert drive(trainer().forward(random_rows(20, 8))).loss == first.loss


def test_training_learns_and_counts() -> None:
    """A few steps lower the loss; the step count, the norm and the scheduled learning rate are reported."""
    run = trainer()
    rows = random_rows(24, 24)
    settings = OptimizerSettings(learning_rate=1e-2, schedule="linear", total_steps=20, grad_clip_norm=1.0)
    losses = []
    for step in range(20):
        losses.append(drive(run.forward_backward(rows)).loss)
        output = run.optim_step(settings)
        assert output.step == run.step == step + 1
        assert output.learning_rate == pytest.approx(1e-2 * (20 - step) / 20)
        assert output.grad_norm > 0
    assert losses[-1] < 0.5 * losses[0]


def test_the_runs_own_clip_is_used_where_the_step_has_none() -> None:
    """max_grad_norm of the run bounds the step unless the settings say otherwise, 0 included."""
    rows, moved = random_rows(24), []
    for own, settings in ((1e-3, None), (None, 1e-3), (1e-3, 0.0), (None, None)):
        run = trainer(max_grad_norm=own)
        before = run.adapter.parameters()[0].detach().clone()
        drive(run.forward_backward(rows))
        run.optim_step(OptimizerSettings(name="sgd", learning_rate=1.0, grad_clip_norm=settings))
        moved.append(float((run.adapter.parameters()[0].detach() - before).abs().max()))
    assert moved[0] == moved[1] < moved[2] == moved[3]


def test_the_gradient_hash_follows_the_gradient() -> None:
    """Equal passes hash equal, further passes change the hash, and a step brings it back to that of no gradient."""
    run, twin = trainer(), trainer()
    empty = run.gradient_hash()
    for each in (run, twin):
        drive(each.forward_backward(random_rows(10)))
    first = run.gradient_hash()
    drive(run.forward_backward(random_rows(11)))
    assert first == twin.gradient_hash() != run.gradient_hash()
    run.optim_step(ADAM)
    assert run.gradient_hash() == empty
    assert first.startswith("sha256:")


def test_a_snapshot_is_the_adapter_of_its_moment() -> None:
    """Training on does not change a snapshot."""
    run = trainer()
    frozen = run.snapshot()
    before = {name: tensor.clone() for name, tensor in frozen.named().items()}
    drive(run.forward_backward(random_rows(10)))
    run.optim_step(ADAM)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.named().items())
    assert not torch.equal(before[next(iter(before))], run.snapshot().named()[next(iter(before))])


def test_a_trainer_says_what_it_is() -> None:
    """The repr names base model, adapter and step."""
    assert repr(trainer()) == "<Trainer on tg-tinker/tiny, <Adapter rank 4 on 28 layers, 45056 values>, step 0>"
