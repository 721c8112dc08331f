"""Optimizers and schedules against vectors, torch, transformers, and themselves after a restart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn
from transformers import Adafactor, get_scheduler

from tg_tinker.engine.training.gradients import GradientSum
from tg_tinker.engine.training.optim import Optimizer
from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
from tg_tinker.engine.training.schedules import learning_rate_at
from tg_tinker.errors import InvalidRequestError, OperationFailedError

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "loss_vectors.json").read_text())


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    """Two matrices and a vector with fixed values."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (4, 2), "c": (6,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in shapes.items()}


def give_gradients(made: dict[str, nn.Parameter], step: int) -> None:
    """Set gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in made.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def run(optimizer: Optimizer, made: dict[str, nn.Parameter], settings: OptimizerSettings, steps: range) -> None:
    """Take some steps at a learning rate that changes from one to the next."""
    for step in steps:
        give_gradients(made, step)
        optimizer.step(settings, 0.01 * (step + 1))


@pytest.mark.parametrize("case", VECTORS["adam_cases"], ids=lambda case: case["id"])
def test_adam_follows_the_vectors(case: dict) -> None:
    """Parameters, both moments and the gradient norm agree at every step, zero gradients and a tiny eps included."""
    config = case["config"]
    settings = OptimizerSettings(
        learning_rate=config["learning_rate"],
        betas=(config["beta1"], config["beta2"]),
        eps=config["eps"],
        weight_decay=config["weight_decay"],
    )
    parameter = nn.Parameter(torch.tensor(case["param0"], dtype=torch.float64))
    optimizer, gradients = Optimizer({"p": parameter}), GradientSum({"p": parameter})
    for number, expected in enumerate(case["trajectory"]):
        parameter.grad = torch.tensor(expected["grad"], dtype=torch.float64)
        gradients.join(normalised=False)
        gradients.add(1)
        norm = gradients.reduce(config["grad_clip_norm"])
        optimizer.step(settings, learning_rate_at(settings, number))
        gradients.clear()
        found = {"param": parameter.detach(), **{name[:-2]: value for name, value in optimizer.tensors().items()}}
        assert norm == pytest.approx(expected["grad_norm_before_clip"], rel=1e-12)
        for name in ("param", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                found[name], torch.tensor(expected[name], dtype=torch.float64), rtol=0, atol=1e-13
            )


def test_hyper_parameters_come_with_every_call() -> None:
    """AdamW whose rate, betas, eps and decay change at each step is the formula of its paper, computed by hand."""
    made = parameters()
    optimizer = Optimizer(made)
    expected = {name: parameter.detach().clone() for name, parameter in made.items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(1, 6):
        beta1, beta2, eps, decay, rate = 0.9 - 0.1 * step, 0.99 - 0.05 * step, 10.0**-step, 0.1 * step, 0.02 / step
        give_gradients(made, step)
        settings = OptimizerSettings(betas=(beta1, beta2), eps=eps, weight_decay=decay)
        optimizer.step(settings, rate)
        for name, parameter in made.items():
            grad = parameter.grad
            first[name] = beta1 * first[name] + (1 - beta1) * grad
            second[name] = beta2 * second[name] + (1 - beta2) * grad**2
            corrected = (second[name] / (1 - beta2**step)).sqrt() + eps
            expected[name] = expected[name] * (1 - rate * decay) - rate * first[name] / (1 - beta1**step) / corrected
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


def _torch_adam(made: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(made, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, foreach=False)


def _torch_sgd(made: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(made, momentum=0.7, weight_decay=0.1, foreach=False)


def _hf_adafactor(made: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Adafactor(made, lr=1.0, scale_parameter=False, relative_step=False, weight_decay=0.1)


@pytest.mark.parametrize(("name", "oracle"), [("adam", _torch_adam), ("sgd", _torch_sgd), ("adafactor", _hf_adafactor)])
def test_the_other_optimizers_are_the_published_ones(name: str, oracle) -> None:
    """Adam with coupled decay, SGD with momentum and Adafactor take the steps of their reference implementations."""
    ours, theirs = parameters(), parameters()
    reference = oracle(list(theirs.values()))
    settings = OptimizerSettings(name=name, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, momentum=0.7)
    optimizer = Optimizer(ours)
    for step in range(5):
        give_gradients(theirs, step)
        reference.param_groups[0]["lr"] = 0.01 * (step + 1)
        reference.step()
    run(optimizer, ours, settings, range(5))
    for key, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_an_optimizer_continues_bit_for_bit(name: str, momentum: float) -> None:
    """Moments taken out and put into a new optimizer continue as if nothing had happened."""
    settings = OptimizerSettings(name=name, weight_decay=0.05, momentum=momentum)
    straight, broken = parameters(torch.float32), parameters(torch.float32)
    run(Optimizer(straight), straight, settings, range(6))
    before = Optimizer(broken)
    run(before, broken, settings, range(3))
    after = Optimizer(broken)
    tensors = {key: value.clone() for key, value in before.tensors().items()}
    after.load(tensors, json.loads(json.dumps(before.counters())))
    run(after, broken, settings, range(3, 6))
    assert all(torch.equal(straight[key], broken[key]) for key in straight)
    assert after.steps == 6


def test_another_kind_of_optimizer_starts_from_no_moments() -> None:
    """Changing from AdamW to SGD and back does not carry moments over."""
    made = parameters()
    optimizer = Optimizer(made)
    run(optimizer, made, OptimizerSettings(), range(2))
    run(optimizer, made, OptimizerSettings(name="sgd"), range(1))
    assert repr(optimizer) == "<Optimizer sgd, 1 steps>"
    assert optimizer.tensors() == {}


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["exp_avg.a"]


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg.a"] = tensors["exp_avg.a"].t()


def _poison(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg_sq.b"][0, 0] = math.inf


def _halve(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg.a"] = tensors["exp_avg.a"].half()


@pytest.mark.parametrize("spoil", [_drop, _reshape, _poison, _halve])
def test_moments_that_do_not_fit_are_refused(spoil) -> None:
    """A missing, misshapen, non-finite or rounded moment is named, and the optimizer keeps what it had."""
    made = parameters()
    optimizer = Optimizer(made)
    run(optimizer, made, OptimizerSettings(), range(2))
    tensors = {key: value.clone() for key, value in optimizer.tensors().items()}
    spoil(tensors)
    with pytest.raises(InvalidRequestError, match="exp_avg"):
        optimizer.load(tensors, optimizer.counters())
    assert optimizer.steps == 2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("constant", {}),
        ("constant_with_warmup", {"warmup_steps": 4}),
        ("linear", {}),
        ("linear", {"warmup_steps": 3}),
        ("cosine", {"warmup_steps": 3}),
        ("cosine", {"schedule_kwargs": {"num_cycles": 1.5}}),
        ("cosine_with_restarts", {"warmup_steps": 2, "schedule_kwargs": {"num_cycles": 3}}),
        ("cosine_with_restarts", {}),
    ],
)
def test_schedules_are_those_of_transformers(name: str, settings: dict) -> None:
    """The learning rate of every step, and of those after the last one, is what get_scheduler gives."""
    ours = OptimizerSettings(learning_rate=0.3, total_steps=20, schedule=name.removesuffix("_with_warmup"), **settings)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=ours.warmup_steps,
        num_training_steps=20,
        scheduler_specific_kwargs=dict(ours.schedule_kwargs) or None,
    )
    for step in range(24):
        assert learning_rate_at(ours, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_a_decaying_schedule_needs_an_end() -> None:
    """Without a number of steps a decay is undefined, and says so."""
    with pytest.raises(InvalidRequestError) as caught:
        learning_rate_at(OptimizerSettings(schedule="cosine"), 0)
    assert caught.value.field == "total_steps"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"name": "lion"}, "name"),
        ({"schedule": "step"}, "schedule"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"grad_clip_norm": math.inf}, "grad_clip_norm"),
        ({"schedule_kwargs": {"num_cycles": 2}}, "schedule_kwargs"),
        ({"schedule": "cosine", "schedule_kwargs": {"cycles": 2}}, "schedule_kwargs"),
        ({"schedule": "cosine", "schedule_kwargs": {"num_cycles": "two"}}, "schedule_kwargs.num_cycles"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, field: str) -> None:
    """Every wrong setting is named."""
    with pytest.raises(InvalidRequestError) as caught:
        attrs.evolve(OptimizerSettings(), **settings)
    assert caught.value.field == field


def gathered(*values: float, tokens: int = 4, normalised: bool = False) -> GradientSum:
    """A gradient sum of one parameter."""
    parameter = nn.Parameter(torch.zeros(len(values), dtype=torch.float64))
    gradients = GradientSum({"p": parameter})
    parameter.grad = torch.tensor(values, dtype=torch.float64)
    gradients.join(normalised=normalised)
    gradients.add(tokens)
    return gradients


def test_clipping_is_exact() -> None:
    """A gradient longer than allowed is scaled to exactly that length; the norm reported is that before."""
    gradients = gathered(3.0, 4.0)
    assert gradients.reduce(2.0) == pytest.approx(5.0)
    assert torch.linalg.vector_norm(gradients.tensors()["grad.p"]) == pytest.approx(2.0, rel=1e-14)


@pytest.mark.parametrize("clip", [None, 0.0, 6.0])
def test_a_short_gradient_is_left_alone(clip: float | None) -> None:
    """None and 0 switch clipping off, and a bound that is not reached changes nothing."""
    gradients = gathered(3.0, 4.0)
    gradients.reduce(clip)
    assert gradients.tensors()["grad.p"].tolist() == [3.0, 4.0]


def test_the_mean_is_taken_when_the_step_is() -> None:
    """A normalised sum is divided by its tokens once, and by one where no token was active."""
    assert gathered(3.0, 4.0, tokens=4, normalised=True).reduce(None) == pytest.approx(1.25)
    assert gathered(0.0, 0.0, tokens=0, normalised=True).reduce(None) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(value: float) -> None:
    """NaN and infinity never reach the parameters."""
    with pytest.raises(OperationFailedError):
        gathered(1.0, value).reduce(1.0)
