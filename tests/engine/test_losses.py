"""The losses against vectors that were made elsewhere, against each other, and at their edges."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tg_tinker.engine.training.batching import Row
from tg_tinker.engine.training.forward import target_logprobs
from tg_tinker.engine.training.inspection import inspect, loss_settings
from tg_tinker.engine.training.losses import LOSSES, active_positions, evaluate, rl_metrics
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.losses import LOSSES as SPECS

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "loss_vectors.json").read_text())
OTHERS = {"dppo_tv", "dppo_kl"}  # the paper's own forms of dppo, which no surface offers
CASES = [case for case in VECTORS["cases"] if case["loss_fn"] not in OTHERS]
LOGIT_CASES = [case for case in VECTORS["logit_cases"] if case["loss_fn"] not in OTHERS]
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 2e-6)]


def tensors(case: dict, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None]:
    """The loss inputs of a case, null as NaN, and the mask that its weights make."""
    names = [name for name in ("logprobs", "advantages", "weights") if case["inputs"].get(name) is not None]
    inputs = {name: torch.tensor(np.array(case["inputs"][name], dtype=float), dtype=dtype) for name in names}
    return inputs, inputs["weights"] != 0 if "weights" in inputs else None


def close(found: Tensor, expected: list, tolerance: float) -> None:
    """Equal to the vector within the tolerance, relative to the larger of one and the value."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert ((found.double() - wanted).abs() <= tolerance * wanted.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_values_and_gradients_are_those_of_the_vectors(case: dict, dtype: torch.dtype, tolerance: float) -> None:
    """Loss per token, its sum and its gradient agree with numbers computed by hand-written formulas."""
    x = torch.tensor(case["inputs"]["target_logprobs"], dtype=dtype, requires_grad=True)
    inputs, mask = tensors(case, dtype)
    loss, config = loss_settings(case["loss_fn"], case["loss_fn_config"])
    values = evaluate(loss, x, inputs, config, torch.ones_like(x, dtype=torch.bool) if mask is None else mask)
    values.sum().backward()
    close(values.detach(), case["per_token_loss"], tolerance)
    close(values.detach().sum(), case["loss_sum"], tolerance)
    close(x.grad, case["grad_wrt_target_logprobs"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("case", LOGIT_CASES, ids=lambda case: case["id"])
def test_gradients_reach_the_logits(case: dict, dtype: torch.dtype, tolerance: float) -> None:
    """From logits through log-softmax and loss and back, masked targets and several targets per position included."""
    logits = torch.tensor(case["inputs"]["logits"], dtype=dtype, requires_grad=True)
    targets = torch.tensor(case["inputs"]["target_tokens"])
    inputs, weighted = tensors(case, dtype)
    mask = (targets != -100) & (torch.ones_like(targets, dtype=torch.bool) if weighted is None else weighted)
    x = target_logprobs(logits, targets.clamp(min=0))
    loss, config = loss_settings(case["loss_fn"], case["loss_fn_config"])
    values = evaluate(loss, x, inputs, config, mask)
    values.sum().backward()
    if "target_logprobs" in case:
        close(x.detach()[mask], torch.tensor(case["target_logprobs"], dtype=torch.float64)[mask].tolist(), tolerance)
    close(values.detach().sum(), case["loss_sum"], tolerance)
    close(logits.grad, case["grad_wrt_logits"], tolerance)


X = torch.tensor([-0.1, -0.7, -1.2, -2.3, -0.05, -3.0], dtype=torch.float64)
INPUTS = {
    "logprobs": torch.tensor([-0.3, -0.6, -1.0, -2.5, -0.9, -3.3], dtype=torch.float64),
    "advantages": torch.tensor([1.0, -0.5, 0.75, -1.25, 2.0, 0.6], dtype=torch.float64),
}
EVERYWHERE = torch.ones(6, dtype=torch.bool)


def gradient(name: str, config: dict[str, float], inputs: dict[str, Tensor] = INPUTS) -> Tensor:
    """The gradient of a loss in its target logprobs; bounds that the API refuses (infinity) are allowed here."""
    x = X.clone().requires_grad_()
    evaluate(LOSSES[name], x, inputs, {**LOSSES[name].spec.defaults, **config}, EVERYWHERE).sum().backward()
    return x.grad


def test_without_bounds_the_losses_are_one() -> None:
    """PPO and CISPO without thresholds, and DPPO without mask and KL, have the gradient of importance sampling."""
    plain = gradient("importance_sampling", {})
    unbounded = {"clip_low_threshold": 0.0, "clip_high_threshold": math.inf}
    open_mask = {"dppo_mask_high": 1.0, "dppo_mask_low": 1.0, "kl_tau": 0.0}
    torch.testing.assert_close(gradient("ppo", unbounded), plain)
    torch.testing.assert_close(gradient("cispo", unbounded), plain)
    torch.testing.assert_close(gradient("dppo", open_mask), plain)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "dppo"])
def test_on_policy_every_gradient_is_minus_the_advantage(name: str) -> None:
    """Where the learner is the sampler, every RL loss is the plain policy gradient."""
    found = gradient(name, {}, {**INPUTS, "logprobs": X})
    torch.testing.assert_close(found, -INPUTS["advantages"])


def test_ratios_beyond_all_bounds_stay_finite() -> None:
    """A log ratio of hundreds neither overflows nor poisons the gradient in fp32."""
    x = torch.tensor([-0.01, -300.0], requires_grad=True)
    inputs = {"logprobs": torch.tensor([-300.0, -0.01]), "advantages": torch.tensor([-1.0, 1.0])}
    evaluate(LOSSES["importance_sampling"], x, inputs, {}, torch.ones(2, dtype=torch.bool)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_masked_positions_enter_no_term() -> None:
    """With some positions masked and full of NaN, every loss is that of the other positions alone."""
    mask = torch.tensor([True, False, True, True, False, True])
    for name in ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "dppo"):
        loss, config = loss_settings(name, None)
        spoilt = {key: value.where(mask, math.nan) for key, value in INPUTS.items()}
        x = X.clone().requires_grad_()
        values = evaluate(loss, x, spoilt, config, mask)
        values.sum().backward()
        alone = evaluate(loss, X[mask], {key: value[mask] for key, value in INPUTS.items()}, config, EVERYWHERE[:4])
        torch.testing.assert_close(values[mask].detach(), alone)
        assert not values[~mask].any()
        assert not x.grad[~mask].any()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_is_the_published_formula(smoothing: float) -> None:
    """Two pairs, by hand: -log sigmoid of beta times the difference of weighted log ratios, smoothed."""
    lengths = torch.tensor([2, 1, 1, 2])
    weights = torch.tensor([1.0, 0.5, 1.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    reference = INPUTS["logprobs"]
    inputs = {"weights": weights, "ref_logprobs": reference, "lengths": lengths}
    loss, config = loss_settings("dpo", {"beta": 0.3, "label_smoothing": smoothing})
    found = evaluate(loss, X, inputs, config, weights != 0)
    gain = (weights * (X - reference)).tolist()
    margins = [0.3 * (gain[0] + gain[1] - gain[2]), 0.3 * (gain[3] - gain[4] - gain[5])]
    expected = [
        (1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * math.log1p(math.exp(margin)) for margin in margins
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_metrics_are_means_of_what_they_say() -> None:
    """Ratio, clip fraction, k3 divergence and entropy estimate, over unmasked tokens."""
    mask = torch.tensor([True, True, True, True, True, False])
    loss, config = loss_settings("ppo", None)
    sums = rl_metrics(loss, X, INPUTS, config, mask)
    ratio = np.exp((X - INPUTS["logprobs"]).numpy()[:5])
    advantages = INPUTS["advantages"].numpy()[:5]
    clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert sums == pytest.approx(
        {
            "ratio_mean": ratio.sum(),
            "clip_fraction": clipped.sum(),
            "mismatch_kl": (ratio - 1 - np.log(ratio)).sum(),
            "entropy": -X.numpy()[:5].sum(),
        }
    )


@pytest.mark.parametrize("name", ["ppo", "cispo", "dppo"])
def test_the_clip_fraction_counts_cut_updates(name: str) -> None:
    """What is counted as clipped is exactly where the gradient differs from that of the unbounded loss."""
    loss, config = loss_settings(name, {"kl_tau": 0.0} if name == "dppo" else None)
    x = X.clone().requires_grad_()
    evaluate(loss, x, INPUTS, config, EVERYWHERE).sum().backward()
    unbounded = gradient("importance_sampling", {})
    cut = ~torch.isclose(x.grad, unbounded)
    assert 0 < int(cut.sum()) == rl_metrics(loss, X, INPUTS, config, EVERYWHERE)["clip_fraction"]


def test_the_registry_is_the_table_that_clients_check_by() -> None:
    """Every loss of the shared table can be computed, under the same inputs and settings."""
    assert set(LOSSES) == set(SPECS)
    for name, loss in LOSSES.items():
        assert loss.spec is SPECS[name]
        assert "." in (loss.fn.__doc__ or "")
    assert LOSSES["ppo"].required_inputs == ("logprobs", "advantages")
    assert LOSSES["ppo"].spec.defaults == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


@pytest.mark.parametrize(
    ("name", "config", "field"),
    [
        ("no_such_loss", None, "loss_fn"),
        ("ppo", {"clip_low": 0.8}, "loss_fn_config.clip_low"),
        ("ppo", {"clip_low_threshold": 1.3}, "loss_fn_config.clip_low_threshold"),
        ("dro", {"beta": math.nan}, "loss_fn_config.beta"),
        ("dpo", {"label_smoothing": 0.5}, "loss_fn_config.label_smoothing"),
        ("importance_sampling", {"beta": 1.0}, "loss_fn_config.beta"),
    ],
)
def test_unknown_losses_and_settings_are_refused(name: str, config: dict[str, float] | None, field: str) -> None:
    """The error names the key, and an unknown key lists those that exist."""
    with pytest.raises(InvalidRequestError) as caught:
        loss_settings(name, config)
    assert caught.value.field == field


def test_an_unknown_setting_lists_the_known_ones() -> None:
    """Whoever mistypes a key is told the right ones."""
    with pytest.raises(InvalidRequestError, match="clip_low_threshold, clip_high_threshold"):
        loss_settings("ppo", {"epsilon": 0.2})


def row(**inputs: list[float]) -> Row:
    """Three positions of which the first has no target."""
    arrays = {name: np.array(values) for name, values in inputs.items()}
    return Row(np.array([1, 2, 3]), np.array([-100, 3, 4]), arrays, where=place)


def place(field: str, *index: int) -> str:
    """Where a value of the sixth datum is."""
    return f"$.data[5].{field}{list(index) or ''}"


def test_positions_without_advantage_or_weight_are_not_active() -> None:
    """RL losses leave out advantages of 0 (prompts), every loss weights of 0 and targets of -100."""
    values = row(logprobs=[math.nan, -1.0, -1.0], advantages=[1.0, 0.0, 2.0], weights=[1.0, 1.0, 1.0])
    assert active_positions(LOSSES["dro"], values).tolist() == [False, False, True]
    assert active_positions(LOSSES["cross_entropy"], values).tolist() == [False, True, True]
    assert active_positions(LOSSES["cross_entropy"], row(weights=[1.0, 0.0, -1.0])).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        (
            {"logprobs": [0.0, -1.0, math.nan], "advantages": [0.0, 1.0, 1.0]},
            "expected a finite number, got one that is not @ $.data[5].logprobs[2]",
        ),
        (
            {"logprobs": [0.0, -1.0, -1.0], "advantages": [0.0, math.inf, 1.0]},
            "expected a finite number, got one that is not @ $.data[5].advantages[1]",
        ),
        (
            {"logprobs": [-1.0, -1.0], "advantages": [0.0, 1.0, 1.0]},
            "expected shape (3,), got (2,) @ $.data[5].logprobs",
        ),
        (
            {"logprobs": [-1.0, -1.0, -1.0]},
            "expected a tensor: this loss needs logprobs, advantages, got none @ $.data[5].advantages",
        ),
        (
            {"logprobs": [0.0] * 3, "advantages": [1.0] * 3, "temperatures": [1.0, 0.0, 1.0]},
            "expected a finite number above 0, got 0.0 @ $.data[5].temperatures[1]",
        ),
    ],
)
def test_bad_inputs_are_named_by_datum_and_index(inputs: dict[str, list[float]], problem: str) -> None:
    """What is not finite where it counts, misshapen or missing is refused by its place."""
    with pytest.raises(InvalidRequestError) as caught:
        inspect([row(**inputs)], LOSSES["ppo"], vocab_size=10, max_length=10)
    assert caught.value.problems == [problem]
    assert str(caught.value.constraint) in problem
    assert caught.value.message.startswith(f"{caught.value.field}: expected {caught.value.constraint}, got ")


def test_what_is_masked_may_be_nan() -> None:
    """Masked positions may hold anything."""
    values = row(logprobs=[math.nan, -1.0, math.inf], advantages=[math.nan, 1.0, 0.0])
    inspect([values], LOSSES["ppo"], vocab_size=10, max_length=10)
