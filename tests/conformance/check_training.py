"""Passes and steps. What the server computes is checked against the formulas of the losses, in plain Python."""

from __future__ import annotations

import asyncio
import math

import pytest
from baseten.loops import AdamParams, ModelInput, RemoteOpError, training_client
from published import PROMPT, SECONDS, STEP, TEXTS, active, datum, learn, lesson, logprobs, publish

ADVANTAGES = [0.7, -0.4, 1.3, -1.1, 0.2, 0.9]
DRIFT = [0.3, -0.5, 0.05, -0.02, 0.6, -0.3]  # of the policy since it sampled; reaches both sides of every clip

LOSSES = {
    "importance_sampling": lambda lp, q, a: -math.exp(lp - q) * a,
    "ppo": lambda lp, q, a: -min(math.exp(lp - q) * a, min(max(math.exp(lp - q), 0.8), 1.2) * a),
    "cispo": lambda lp, q, a: -min(max(math.exp(lp - q), 0.8), 1.2) * lp * a,
    "dro": lambda lp, q, a: -(lp * a - 0.5 * 0.05 * (lp - q) ** 2),
    "dppo": lambda lp, q, a: -_kept(lp, q, a) * a * math.exp(lp - q) + 1e-3 * (lp - q) ** 2,
}


def _kept(lp: float, q: float, a: float) -> float:
    moved = math.exp(lp) - math.exp(q)
    return 0.0 if (moved > 0.2 if a > 0 else moved < -0.2) else 1.0


def test_the_loss_falls(trainer):
    """Four steps of cross entropy teach the lesson; the version counts the steps."""
    losses = learn(trainer, 4)
    assert losses[-1] < 0.7 * losses[0]
    assert losses == sorted(losses, reverse=True)
    assert trainer.policy_version == 4


def test_cross_entropy_is_the_mean_over_what_counts(trainer):
    """The loss is minus the mean log-probability of the targets; masked positions are 0.0."""
    data = [datum(TEXTS[0], masked=2), datum(TEXTS[1])]
    output = trainer.forward(data, "cross_entropy").result(timeout=SECONDS)
    found = logprobs(output)
    assert found[0][:2] == [0.0, 0.0]
    counted = [value for one, values in zip(data, found, strict=True) for value in active(one, values)]
    assert output.loss == pytest.approx(-sum(counted) / len(counted), abs=1e-5)
    assert output.metrics["loss"] == pytest.approx(output.loss)
    weights = [0.5, 0.0, 2.0, 1.0, 1.0, 0.25]
    weighted = trainer.forward([datum(TEXTS[0], weights=weights)], "cross_entropy").result(timeout=SECONDS)
    terms = [-weight * value for weight, value in zip(weights, logprobs(weighted)[0], strict=True)]
    assert weighted.loss == pytest.approx(sum(terms) / 5, abs=1e-5)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_policy_losses_are_their_formulas(trainer, loss_fn):
    """Each loss of reinforcement learning is the mean of its formula over the positions with an advantage."""
    plain = datum(TEXTS[0])
    (lp,) = logprobs(trainer.forward([plain], "cross_entropy").result(timeout=SECONDS))
    sampled = [value - drift for value, drift in zip(lp, DRIFT, strict=True)]
    data = [datum(TEXTS[0], logprobs=sampled, advantages=ADVANTAGES)]
    output = trainer.forward_backward(data, loss_fn).result(timeout=SECONDS)
    terms = [LOSSES[loss_fn](*three) for three in zip(lp, sampled, ADVANTAGES, strict=True)]
    assert output.loss == pytest.approx(sum(terms) / len(terms), abs=1e-4)
    assert logprobs(output)[0] == pytest.approx(lp, abs=1e-4)
    assert trainer.optim_step(STEP).result(timeout=SECONDS).metrics["grad_norm"] > 0


def test_sums_are_given_when_asked_for(trainer):
    """skip_token_normalization makes the loss a sum, and is acknowledged."""
    mean = trainer.forward(lesson(), "cross_entropy").result(timeout=SECONDS)
    config = {"skip_token_normalization": True}
    total = trainer.forward(lesson(), "cross_entropy", config).result(timeout=SECONDS)
    assert total.metrics["skip_token_normalization"] == 1.0
    assert total.loss == pytest.approx(mean.loss * sum(len(text) - 1 for text in TEXTS), abs=1e-3)


def test_operations_are_sent_before_results_are_asked_for(trainer):
    """Passes and steps in a row are taken in the order in which they were submitted."""
    futures = [(trainer.forward_backward(lesson()), trainer.optim_step(STEP)) for _ in range(4)]
    losses = [passed.result(timeout=SECONDS).loss for passed, _ in futures]
    assert losses == sorted(losses, reverse=True)
    assert [stepped.result(timeout=SECONDS).metrics["step"] for _, stepped in futures] == [1.0, 2.0, 3.0, 4.0]
    assert all(stepped.done() for _, stepped in futures)


async def test_coroutines_train_as_well(trainer):
    """The asynchronous face: the first await is acceptance, the second the result; order is that of the calls."""
    futures = []
    for _ in range(3):
        futures.append(await trainer.forward_backward_async(lesson(), "cross_entropy"))
        futures.append(await trainer.optim_step_async(STEP))
    results = await asyncio.gather(*futures)
    losses = [one.loss for one in results[::2]]
    assert losses == sorted(losses, reverse=True)
    assert [one.metrics["step"] for one in results[1::2]] == [1.0, 2.0, 3.0]
    forward = await (await trainer.forward_async(lesson(), "cross_entropy"))
    assert forward.loss < losses[-1]


def test_a_large_pass_is_sent_in_parts(trainer, monkeypatch):
    """A body above that client's limit goes out as several, and gives the same gradient as in one piece."""

    def pass_and_step() -> tuple[float, list[list[float]]]:
        trainer.init_trainer_server(lora_rank=8).result(timeout=SECONDS)
        output = trainer.forward_backward(lesson() * 3, "cross_entropy").result(timeout=SECONDS)
        step = trainer.optim_step(AdamParams(learning_rate=1e-3, grad_clip_norm=0.0)).result(timeout=SECONDS)
        return step.metrics["grad_norm"], logprobs(output)

    norm, found = pass_and_step()
    monkeypatch.setattr(training_client, "_MAX_REQUEST_BYTES", 900)
    parts_norm, parts_found = pass_and_step()
    assert parts_norm == pytest.approx(norm, rel=1e-4)
    assert [len(values) for values in parts_found] == [len(values) for values in found]
    for part, whole in zip(parts_found, found, strict=True):
        assert part == pytest.approx(whole, abs=1e-5)


def test_a_pass_without_gradients_leaves_none(trainer):
    """After forward alone there is nothing to step with: the operation fails, and says why."""
    trainer.forward(lesson(), "cross_entropy").result(timeout=SECONDS)
    with pytest.raises(RemoteOpError, match="no gradient") as caught:
        trainer.optim_step(STEP).result(timeout=SECONDS)
    assert caught.value.error_class == "ValueError"


def test_what_the_trainer_computes_is_what_the_sampler_computes(trainer):
    """Log-probabilities of a trained adapter agree between forward and the sampler."""
    learn(trainer, 2)
    sampler = publish(trainer, "compared")
    tokens = PROMPT + TEXTS[0]
    (trained,) = logprobs(trainer.forward([datum(tokens)], "cross_entropy").result(timeout=SECONDS))
    first, *sampled = sampler.compute_logprobs(ModelInput.from_ints(tokens))
    assert first is None
    assert sampled == pytest.approx(trained, abs=1e-3)
    sampler.close()
