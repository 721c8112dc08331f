"""Losses through the whole trainer: chunks, temperatures, RL inputs, pairs, other architectures."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from fixtures.training import drive, gradients, random_rows, stir, tiny, trainer
from transformers import Gemma2Config, Gemma2ForCausalLM

from tg_tinker.engine.lora import adapters, lora_linear
from tg_tinker.engine.lora.adapters import AdapterSpec, active
from tg_tinker.engine.lora.lora_linear import GradientFactors
from tg_tinker.engine.training import forward
from tg_tinker.engine.training.batching import Row
from tg_tinker.engine.training.gradients import ExampleGradients
from tg_tinker.engine.training.trainer import Trainer

RL_INPUTS = ("logprobs", "advantages")
PAIRS = ("weights", "ref_logprobs")


def run_once(rows: list[Row], loss_fn: str = "cross_entropy", **settings):
    """One pass of a new trainer: its output, and its gradient."""
    run = trainer(**settings)
    output = drive(run.forward_backward(rows, loss_fn))
    return output, gradients(run)


@pytest.mark.parametrize(("loss_fn", "inputs"), [("cross_entropy", ()), ("dppo", RL_INPUTS), ("dpo", PAIRS)], ids=str)
def test_logits_in_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, loss_fn: str, inputs: tuple[str, ...]
) -> None:
    """With the head run over a few positions at a time, loss, logprobs and gradient are the same."""
    rows = random_rows(30, 22, 17, 25, inputs=inputs)
    whole, expected = run_once(rows, loss_fn)
    monkeypatch.setattr(forward, "_LOGITS_AT_ONCE", 264 * 5)
    chunked, found = run_once(rows, loss_fn)
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-5)
    np.testing.assert_allclose(np.concatenate(chunked.logprobs), np.concatenate(whole.logprobs), atol=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


def test_no_logits_are_larger_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the rows, the head never sees more positions than the bound allows."""
    seen = []
    plain = forward.target_logprobs

    def watched(logits: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(logits.numel())
        return plain(logits, *rest)

    monkeypatch.setattr(forward, "target_logprobs", watched)
    monkeypatch.setattr(forward, "_LOGITS_AT_ONCE", 2000)
    run_once(random_rows(60, 61))
    assert max(seen) <= 2000
    assert sum(seen) == 264 * (59 + 60)


def test_checkpointing_a_run_changes_no_bit() -> None:
    """A run with gradient checkpointing has the same gradient as one without, dropout included."""
    spec = AdapterSpec(rank=4, alpha=8.0, dropout=0.1)
    _, expected = run_once(random_rows(30, 22), spec=spec)
    _, found = run_once(random_rows(30, 22), spec=spec, gradient_checkpointing=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_temperatures_divide_the_logits() -> None:
    """Logprobs are those of the scaled distribution, position by position."""
    (row,) = random_rows(20)
    temperatures = np.linspace(0.5, 2.0, 20)
    run = trainer()
    found = drive(run.forward([attrs.evolve(row, inputs={"temperatures": temperatures})])).logprobs[0]
    with active(run.base, run.adapter), torch.no_grad():
        logits = run.base.model(torch.from_numpy(row.tokens)[None]).logits[0]
    scaled = (logits / torch.from_numpy(temperatures)[:, None]).log_softmax(-1)
    expected = scaled[torch.arange(19), torch.from_numpy(row.targets[:-1])]
    np.testing.assert_allclose(found[:-1], expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "dppo"])
def test_on_policy_rl_is_weighted_likelihood(loss_fn: str) -> None:
    """With the run's own logprobs as the sampler's, every RL gradient is that of advantage-weighted cross entropy."""
    (row,) = random_rows(25)
    own = drive(trainer().forward([row])).logprobs[0]
    advantages = np.random.default_rng(1).normal(size=25)
    output, found = run_once([attrs.evolve(row, inputs={"logprobs": own, "advantages": advantages})], loss_fn)
    _, expected = run_once([attrs.evolve(row, inputs={"weights": advantages})])
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-3, rtol=1e-3)
    assert output.metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert output.metrics["mismatch_kl"] == pytest.approx(0.0, abs=1e-4)
    assert output.metrics["entropy"] == pytest.approx(-own[:-1].mean(), rel=1e-4)


def test_prompt_positions_of_rl_rows_do_not_count() -> None:
    """Positions with advantage 0 enter neither loss nor mean, and may hold any logprob; their logprobs are reported."""
    (row,) = random_rows(20, inputs=RL_INPUTS)
    inputs = {name: values.copy() for name, values in row.inputs.items()}
    inputs["advantages"][:8], inputs["logprobs"][:8] = 0.0, np.nan
    output, found = run_once([attrs.evolve(row, inputs=inputs)], "dro")
    targets = np.where(np.arange(20) < 8, -100, row.targets)
    bare, expected = run_once([attrs.evolve(row, targets=targets, inputs=inputs)], "dro")
    assert output.num_tokens == bare.num_tokens == 11
    assert output.loss == pytest.approx(bare.loss, rel=1e-6)
    assert output.logprobs[0][:8].all()
    assert not bare.logprobs[0][:8].any()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


def test_dpo_is_a_mean_over_pairs_that_stay_together() -> None:
    """However pairs are spread over micro-batches, the loss is the mean of each pair's own."""
    rows = random_rows(30, 12, 28, 40, inputs=PAIRS)
    together, _ = run_once(rows, "dpo", micro_batch_tokens=64)
    apart = [run_once(rows[start : start + 2], "dpo")[0] for start in (0, 2)]
    assert together.num_tokens == 2
    assert together.loss == pytest.approx(np.mean([each.loss for each in apart]), rel=1e-5)


def test_pairs_have_temperatures_too() -> None:
    """The logprobs of dpo are those of the scaled distribution, in value and gradient, as for any likelihood."""
    rows = random_rows(12, 9, inputs=PAIRS)
    hot = [
        attrs.evolve(row, inputs={**row.inputs, "temperatures": np.linspace(0.5, 2.0, len(row.tokens))}) for row in rows
    ]
    output, found = run_once(hot, "dpo")
    bare = [attrs.evolve(row, inputs={"temperatures": row.inputs["temperatures"]}) for row in hot]
    expected = drive(trainer().forward(bare)).logprobs
    for one, other in zip(output.logprobs, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    gains = [
        float((row.inputs["weights"] * (x - row.inputs["ref_logprobs"]))[:-1].sum())
        for row, x in zip(rows, expected, strict=True)
    ]
    pull = 0.1 / (1.0 + np.exp(0.1 * (gains[0] - gains[1])))
    signed = [
        attrs.evolve(row, inputs={**row.inputs, "weights": sign * pull * row.inputs["weights"]})
        for sign, row in zip((1.0, -1.0), hot, strict=True)
    ]
    _, likelihood = run_once(signed)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, likelihood[name], atol=1e-4, rtol=1e-3)


def test_a_fully_masked_request_is_no_failure() -> None:
    """Rows without any target give loss 0 and a zero gradient, which can be stepped with."""
    run = trainer()
    output = drive(run.forward_backward([Row(np.array([1, 2, 3]), np.full(3, -100))]))
    assert (output.loss, output.num_tokens) == (0.0, 0)
    assert not output.logprobs[0].any()
    assert all(not gradient.any() for gradient in gradients(run).values())


def test_an_architecture_that_treats_its_logits_is_trained_right() -> None:
    """A model with soft-capped logits gives its own HF loss, not that of the bare output head."""
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, final_logit_softcapping=2.0, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(8.0)
    lora_linear.install(model)
    base = attrs.evolve(tiny(), name="gemma", model=model, vocab_size=64, max_length=128)
    run = Trainer(base, AdapterSpec(rank=2, alpha=2.0), reduction="token_mean", seed=0)
    stir(run.adapter)
    tokens = np.random.default_rng(0).integers(0, 64, 40)
    output = drive(run.forward_backward([Row(tokens, np.append(tokens[1:], -100))]))
    with active(base, run.adapter), torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens)[None], labels=torch.from_numpy(tokens)[None]).loss
    assert output.loss == pytest.approx(float(expected), rel=1e-5)
    assert any(gradient.any() for gradient in gradients(run).values())


def test_a_bf16_base_trains_near_its_fp32_self() -> None:
    """bf16 compute with fp32 logprobs and masters gives nearly the same loss and gradient direction."""
    exact, expected = run_once(random_rows(40, 30))
    rough, found = run_once(random_rows(40, 30), base=tiny("bfloat16"))
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    one, two = (torch.cat([value.flatten() for value in each.values()]) for each in (found, expected))
    assert found[next(iter(found))].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.98


class Summing:
    """Takes over a micro-batch's gradients and adds them up example by example, as clipping would."""

    def __init__(self) -> None:
        self.layers: dict[str, GradientFactors] = {}

    def record(self, layer: str, factors: GradientFactors) -> None:
        self.layers[layer] = factors

    def finish(self, adapter: adapters.Adapter) -> None:
        for name, (a, b) in adapter.layers.items():
            factors = self.layers[name]
            ours = torch.einsum("ntr,nti->ri", factors.hidden_grad, factors.inputs)
            other = factors.scale * torch.einsum("nto,ntr->or", factors.output_grad, factors.hidden)
            for parameter, value in ((a, ours), (b, other)):
                parameter.grad = value if parameter.grad is None else parameter.grad + value


def test_per_example_gradients_can_be_taken_over() -> None:
    """What a recorder makes of the factors is the gradient of the run; plain summing gives the plain gradient."""
    rows = random_rows(30, 22, 40, 8)
    _, expected = run_once(rows, micro_batch_tokens=64)
    run = trainer(micro_batch_tokens=64)
    shapes = []

    def take_over(batch) -> ExampleGradients:
        shapes.append(tuple(batch.tokens.shape))
        return Summing()

    run.per_example = take_over
    drive(run.forward_backward(rows))
    assert len(shapes) == 3
    for name, gradient in gradients(run).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)
