from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError
from tg_tinker.privacy.accountant import Mechanism, spent
from tg_tinker.privacy.ledger import Ledger
from tg_tinker.privacy.policy import RunPrivacy
from tg_tinker.privacy.settings import PrivacySettings
from tg_tinker.types.config import DPConfig
from tg_tinker.wire.errors import from_wire

SECRET = bytes(32)
SUMS = {"b": torch.linspace(-1, 1, 12).reshape(3, 4), "a": torch.ones(5)}


def settings(batch: int | None = 4, **fields: Any) -> PrivacySettings:
    """Complete a config."""
    return PrivacySettings.of(DPConfig(**fields), default_batch_size=batch)


def privacy(folder: Path, lineage: str = "run-1", **fields: Any) -> RunPrivacy:
    """Guard a run."""
    return RunPrivacy(settings(**fields), Ledger(folder, lineage), SECRET)


def example(value: int) -> dict[str, Any]:
    """Make an example."""
    return {"tokens": np.array([1, 2, value]), "targets": np.array([2, value, -100])}


def snapshot(run: RunPrivacy, folder: Path) -> tuple[Any, ...]:
    """Take everything a refused step must not change."""
    return run.state(), sorted((path.name, path.read_bytes()) for path in folder.iterdir())


# settings


def test_without_a_declaration_nothing_is_claimed() -> None:
    """No sample rate and no dataset size: accounting without amplification."""
    assert settings().sample_rate == 1.0
    assert settings(sample_rate=0.25).sample_rate == 0.25
    assert settings(batch=8, dataset_size=64).sample_rate == 0.125
    assert settings(batch=8, dataset_size=64, sample_rate=0.5).sample_rate == 0.5


def test_secure_mode_changes_nothing() -> None:
    """Noise is always drawn as ``secure_mode`` asks for, so the field is accepted and has no further effect."""
    assert settings(secure_mode=True) == settings(secure_mode=False)


def test_the_divisor_is_public() -> None:
    """The expected batch size is the config's, else the surface's default, else asked for by name."""
    assert settings(batch=16).expected_batch_size == 16
    assert settings(batch=16, expected_batch_size=3).expected_batch_size == 3
    with pytest.raises(InvalidRequestError) as caught:
        settings(batch=None)
    assert caught.value.field == "dp_config.expected_batch_size"


def test_a_batch_larger_than_the_data_is_refused() -> None:
    """An expected batch above the dataset's size is no sampling."""
    with pytest.raises(InvalidRequestError) as caught:
        settings(batch=65, dataset_size=64)
    assert caught.value.field == "dp_config.dataset_size"


def test_a_weak_delta_is_warned_of() -> None:
    """δ not below 1/n brings a warning, a smaller one none."""
    assert settings(dataset_size=1000, target_delta=1e-3).warnings
    assert not settings(dataset_size=1000, target_delta=1e-4).warnings


def test_a_rate_that_the_batch_size_belies_is_warned_of() -> None:
    """Rate, data and batch that do not fit by an example or more bring a warning; rounding does not."""
    assert "draws 32 a step" in settings(batch=8, dataset_size=64, sample_rate=0.5).warnings[0]
    assert settings(batch=8, dataset_size=1000, sample_rate=1e-6).warnings
    assert not settings(batch=6, dataset_size=64, sample_rate=0.1).warnings
    assert not settings(batch=8, sample_rate=0.1).warnings


# releases


def test_a_release_is_sum_plus_noise_over_the_public_batch_size(tmp_path: Path) -> None:
    """(sum + σC·noise) / B: over many values the noise has the promised standard deviation and mean zero."""
    run = privacy(tmp_path, noise_multiplier=2.0, max_grad_norm=0.5, target_epsilon=None)
    sums = {"w": torch.full((100_000,), 3.0, dtype=torch.float64)}
    noise = run.release(sums, step=1).gradients["w"] * 4 - 3.0
    assert abs(float(noise.mean())) < 5 / math.sqrt(100_000)
    assert float(noise.std()) == pytest.approx(1.0, abs=5 / math.sqrt(2 * 100_000))


def test_noise_is_the_same_for_a_replay_and_no_other_step(tmp_path: Path) -> None:
    """The same step on the same sums gives the same bits; another step, gradient or run gives others."""
    first = privacy(tmp_path).release(SUMS, step=1).gradients
    again = privacy(tmp_path).release(dict(reversed(SUMS.items())), step=1).gradients
    assert all(torch.equal(first[name], again[name]) for name in SUMS)
    moved = {**SUMS, "a": SUMS["a"] * (1 + 1e-6)}
    others = [
        privacy(tmp_path, "run-2").release(SUMS, step=1),
        privacy(tmp_path, target_epsilon=None).release(SUMS, step=2),
        privacy(tmp_path, target_epsilon=None).release(moved, step=1),
    ]
    assert not any(torch.isclose(first["a"], other.gradients["a"], rtol=1e-4).any() for other in others)


def test_a_replay_is_not_charged_twice(tmp_path: Path) -> None:
    """Releasing the same step again spends nothing, even with the budget used up."""
    once = settings(noise_multiplier=4.0)
    budget = spent({once.mechanism(): 1}, once.delta).epsilon
    run = privacy(tmp_path, noise_multiplier=4.0, target_epsilon=budget)
    first = run.release(SUMS, step=1).metrics
    run.admit([example(1)], step=1)
    again = run.release(SUMS, step=1).metrics
    assert (first.total_epsilon, again.total_epsilon) == (pytest.approx(budget), pytest.approx(budget))
    assert again.epsilon_spent == 0.0
    assert len(run.ledger) == 1
    with pytest.raises(DPBudgetExceededError):
        run.release(SUMS, step=2)


def test_each_step_reports_what_it_cost(tmp_path: Path) -> None:
    """``epsilon_spent`` is the growth of the total; the costs sum to it; δ is the target's."""
    run = privacy(tmp_path, target_epsilon=None, sample_rate=0.01, target_delta=1e-6)
    metrics = [run.release(SUMS, step=step).metrics for step in range(1, 6)]
    assert metrics[-1].total_epsilon == spent({Mechanism(1.0, 0.01): 5}, 1e-6).epsilon
    costs = [one.epsilon_spent for one in metrics if one.epsilon_spent is not None]
    assert sum(costs) == pytest.approx(metrics[-1].total_epsilon)
    assert costs[0] > costs[1] > 0
    assert {one.delta for one in metrics} == {1e-6}
    assert all(one.noise_applied for one in metrics)


def test_the_ledger_is_durable_before_noise_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When drawing fails, the step is charged on disk already: a crash over-counts, never under-counts."""

    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("tg_tinker.privacy.noise.NoiseStream.normal", broken)
    with pytest.raises(RuntimeError):
        privacy(tmp_path).release(SUMS, step=1)
    assert len(Ledger(tmp_path, "run-1")) == 1


def test_no_noise_is_drawn_while_the_ledger_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose charge did not reach the disk fails, however often it is tried, until the charge is there."""
    run = privacy(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "no space left", str(descriptor))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(2):
            with pytest.raises(OSError, match="no space"):
                run.release(SUMS, step=1)
    assert run.release(SUMS, step=1).metrics.total_epsilon == pytest.approx(4.377178, abs=1e-5)
    assert len(Ledger(tmp_path, "run-1")) == 1


def test_an_exhausted_budget_changes_nothing(tmp_path: Path) -> None:
    """A refused step, pass or unnoised step leaves ledger, file, examples and counters as they were, and tells ε."""
    run = privacy(tmp_path, target_epsilon=6.0)
    run.admit([example(1)], step=1)
    run.release(SUMS, step=1)
    before = snapshot(run, tmp_path)
    for action in (
        lambda: run.release(SUMS, step=2),
        lambda: run.admit([example(2)], step=2),
        lambda: run.release(SUMS, step=2, noise=False),
    ):
        with pytest.raises(DPBudgetExceededError) as caught:
            action()
        error = caught.value
        assert error.current_epsilon == pytest.approx(4.377178, abs=1e-5)
        assert (error.max_epsilon, error.delta) == (6.0, 1e-5)
        assert error.projected_epsilon is None or error.projected_epsilon > 6.0
        assert snapshot(run, tmp_path) == before


def test_a_budget_can_be_met_exactly(tmp_path: Path) -> None:
    """A target equal to ε after three steps allows three and not four."""
    target = spent({Mechanism(1.0, 1.0): 3}, 1e-5).epsilon
    run = privacy(tmp_path, target_epsilon=target)
    for step in (1, 2, 3):
        run.release(SUMS, step=step)
    with pytest.raises(DPBudgetExceededError):
        run.check_budget()
    assert run.report().remaining_epsilon == pytest.approx(0.0, abs=1e-9)


def test_an_infinite_epsilon_crosses_the_wire_as_none(tmp_path: Path) -> None:
    """Under a target, with a step without noise inherited, the error says "infinite" and carries None both ways."""
    inherited = privacy(tmp_path / "parent", "parent", target_epsilon=None)
    inherited.release(SUMS, step=1, noise=False)
    run = privacy(tmp_path / "heir", "heir", target_epsilon=8.0)
    run.restore(inherited.state(), with_step=False)
    with pytest.raises(DPBudgetExceededError, match="ε is infinite") as caught:
        run.check_budget()
    assert (caught.value.current_epsilon, caught.value.projected_epsilon, caught.value.max_epsilon) == (None, None, 8.0)
    body = json.dumps(caught.value.to_wire(), allow_nan=False)
    received = from_wire(json.loads(body)["error"], 400)
    assert isinstance(received, DPBudgetExceededError)
    assert received.current_epsilon is None


@pytest.mark.parametrize("fields", [{"noise_multiplier": 0.0}, {}])
def test_a_step_without_noise_is_refused_or_recorded(tmp_path: Path, fields: dict[str, float]) -> None:
    """σ = 0 or no noise: refused under a target; else the sum is plain and the total infinite from then on."""
    noise = bool(fields)
    with pytest.raises(DPBudgetExceededError) as caught:
        privacy(tmp_path, **fields).release(SUMS, step=1, noise=noise)
    assert caught.value.projected_epsilon is None
    run = privacy(tmp_path, target_epsilon=None, **fields)
    released = run.release(SUMS, step=1, noise=noise)
    assert torch.equal(released.gradients["a"], SUMS["a"] / 4)
    assert not released.metrics.noise_applied
    for metrics in (released.metrics, run.release(SUMS, step=2, noise=True).metrics):
        assert metrics.epsilon_is_infinite
        assert metrics.total_epsilon is None
        assert metrics.epsilon_spent is None
    assert run.report().epsilon_is_infinite


def test_an_empty_draw_is_noise_and_is_charged(tmp_path: Path) -> None:
    """A step without examples releases noise alone, costs a step, and reports no norms."""
    run = privacy(tmp_path, target_epsilon=None)
    released = run.release({"w": torch.zeros(1000)}, step=1)
    assert released.gradients["w"].std() > 0.2
    metrics = released.metrics
    assert metrics.total_epsilon == pytest.approx(4.377178, abs=1e-5)
    assert (metrics.grad_norm_before_clip, metrics.num_clipped) == (0.0, 0)


def test_gdp_reports_both_numbers(tmp_path: Path) -> None:
    """With "gdp" the total is the sound bound and the central-limit number an extra field."""
    run = privacy(tmp_path, accountant_type="gdp", sample_rate=0.01, target_epsilon=None)
    metrics = run.release(SUMS, step=1).metrics
    assert metrics.gdp_epsilon is not None
    assert metrics.total_epsilon is not None
    assert metrics.gdp_epsilon < metrics.total_epsilon


# examples


def test_an_example_enters_a_step_once(tmp_path: Path) -> None:
    """The same example again, in this batch or another of the step, is refused; in the next step it may return."""
    run = privacy(tmp_path, target_epsilon=None)
    run.admit([example(1), example(2)], step=1)
    for batch in ([example(3), example(3)], [example(3), example(2)]):
        before = run.state()
        with pytest.raises(InvalidRequestError) as caught:
            run.admit(batch, step=1)
        assert caught.value.field == "batch[1]"
        assert run.state() == before
    run.admit([example(3)], step=1)
    run.release(SUMS, step=1)
    run.admit([example(1)], step=2)


def test_discarded_examples_may_come_again(tmp_path: Path) -> None:
    """When the step's gradients were thrown away, its examples were not used."""
    run = privacy(tmp_path)
    run.admit([example(1)], step=1)
    run.discard()
    run.admit([example(1)], step=1)


def test_example_digests_are_keyed(tmp_path: Path) -> None:
    """What is kept of examples tells nothing without the server's secret."""
    states = []
    for secret in (bytes(32), bytes(31) + b"\1"):
        run = RunPrivacy(settings(), Ledger(tmp_path, "run-1"), secret)
        run.admit([example(1)], step=1)
        states.append(run.state()["examples"])
    assert states[0] != states[1]
    assert states[0][0].startswith("hmac-sha256:")


def test_runs_hash_under_different_keys(tmp_path: Path) -> None:
    """Two runs' batch and gradient hashes cannot be compared."""
    assert privacy(tmp_path, "run-1").hash_key != privacy(tmp_path, "run-2").hash_key


# the ledger across checkpoints


def test_loading_never_rolls_the_ledger_back(tmp_path: Path) -> None:
    """After loading an earlier checkpoint the later releases still count."""
    run = privacy(tmp_path, target_epsilon=None)
    run.release(SUMS, step=1)
    early = run.state()
    run.release(SUMS, step=2)
    run.release(SUMS, step=3)
    total = run.spent()
    run.restore(early, with_step=True)
    assert run.spent() == total


def test_a_run_inherits_the_ledger_of_its_weights(tmp_path: Path) -> None:
    """A new run that starts from a checkpoint begins with what that one had spent, durably."""
    old = privacy(tmp_path, target_epsilon=None)
    for step in (1, 2):
        old.release(SUMS, step=step)
    new = privacy(tmp_path, "run-2", noise_multiplier=2.0, target_epsilon=None)
    new.restore(old.state(), with_step=False)
    new.release(SUMS, step=3)
    expected = spent({Mechanism(1.0, 1.0): 2, Mechanism(2.0, 1.0): 1}, 1e-5)
    assert new.spent() == privacy(tmp_path, "run-2", target_epsilon=None).spent() == expected
    assert len(old.ledger) == 2


def test_a_step_in_progress_comes_back(tmp_path: Path) -> None:
    """Examples that are part of a saved gradient stay part of it, also on another run."""
    run = privacy(tmp_path)
    run.admit([example(1)], step=1)
    new = privacy(tmp_path, "run-2")
    new.restore(run.state(), with_step=True)
    with pytest.raises(InvalidRequestError):
        new.admit([example(1)], step=1)


@pytest.mark.parametrize("state", [{}, {"ledger": [{}], "counters": {}, "examples": []}, {"ledger": 3}])
def test_a_checkpoint_without_a_readable_ledger_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    """Nothing is guessed from a ledger that does not read."""
    with pytest.raises(InvalidRequestError) as caught:
        privacy(tmp_path).restore(state, with_step=False)
    assert caught.value.field == "ledger"


def test_the_report_says_everything(tmp_path: Path) -> None:
    """Unit, parameters, steps, total and what remains."""
    run = privacy(tmp_path, sample_rate=0.01, target_epsilon=3.0)
    run.release(SUMS, step=1)
    report = run.report()
    assert report.unit == "one row of a batch"
    assert (report.steps, report.sample_rate, report.expected_batch_size) == (1, 0.01, 4)
    assert report.total_epsilon is not None
    assert report.remaining_epsilon == pytest.approx(3.0 - report.total_epsilon)
