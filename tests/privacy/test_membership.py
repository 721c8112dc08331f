"""An attacker against private training: who knows everything but one example should not tell whether it was there.

The attacker sees every release, and knows the other examples, the canary and all settings. ``TG_TINKER_ATTACK_RUNS``
says how many runs there are (40; the numbers of docs/privacy.md are of 200), and ``--log-cli-level=INFO`` shows them.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import attrs
import pytest
import torch
from fixtures.private_runs import Private, make_rows, make_trainer, one_by_one
from scipy.stats import beta

from tg_tinker.engine.models.base_model import BaseModel
from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
from tg_tinker.privacy import clipping

RUNS = int(os.environ.get("TG_TINKER_ATTACK_RUNS", "40"))
CANARY = make_rows(99, (12,))
OTHERS = make_rows(0, (6, 8, 10))
STEPS, SIGMA, CLIP, BATCH, DELTA = 2, 5.275, 0.05, 4, 1e-5
SLOW = OptimizerSettings(name="sgd", learning_rate=1e-3)  # so slow that the gradients stay as they were
MU = math.sqrt(STEPS) / SIGMA  # what the canary adds to a score when it is clipped to CLIP
THRESHOLDS = (MU / 2, 1.0, 2.0, 4.0)  # fixed before any run
CONFIDENCE = 0.95

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.timeout(60 + 3 * RUNS)


@attrs.frozen
class Attack:
    """Scores of runs without and with the canary, and the ε that the runs reported."""

    absent: list[float]
    present: list[float]
    reported: float

    def epsilon_lower_bound(self) -> float:
        """Bound ε from below: P(hit) <= e^ε P(false alarm) + δ, at the best threshold.

        Clopper-Pearson on either rate; the error is shared between both rates and all thresholds, so that all bounds
        hold together with probability ``CONFIDENCE``.
        """
        error = (1.0 - CONFIDENCE) / (2 * len(THRESHOLDS))
        best = 0.0
        for threshold in THRESHOLDS:
            hits = sum(score > threshold for score in self.present)
            alarms = sum(score > threshold for score in self.absent)
            hit_rate = at_least(hits, len(self.present), error)
            alarm_rate = 1.0 - at_least(len(self.absent) - alarms, len(self.absent), error)
            if hit_rate > DELTA:
                best = max(best, math.log((hit_rate - DELTA) / alarm_rate))
        return best


def at_least(successes: int, trials: int, error: float) -> float:
    """Bound a probability from below (Clopper and Pearson 1934): wrong with probability ``error`` at most."""
    return float(beta.ppf(error, successes, trials - successes + 1)) if successes else 0.0


def attack(base: BaseModel, folder: Path, *, clip: float = CLIP) -> Attack:
    """Train tiny runs, every other one with the canary; score each by what it released along the canary's gradient.

    A score is in standard deviations of the noise: by the promise, those without the canary are standard normal.
    """
    canary, _ = one_by_one(base, CANARY, norm=clip)
    direction = canary / canary.norm()
    expected = float(one_by_one(base, OTHERS, norm=clip)[0] @ direction)
    scores: dict[bool, list[float]] = {False: [], True: []}
    reported = 0.0
    for number in range(RUNS):
        present = number % 2 == 1
        trainer = make_trainer(base)
        secret = number.to_bytes(32, "little")
        private = Private(
            trainer, folder, f"attack-{number}", secret, noise_multiplier=SIGMA, max_grad_norm=CLIP, target_delta=DELTA
        )
        score = 0.0
        for _ in range(STEPS):
            before = torch.cat([parameter.detach().flatten() for parameter in trainer.adapter.parameters()])
            private.forward_backward([*OTHERS, *CANARY] if present else OTHERS)
            reported = private.optim_step(SLOW)[1].total_epsilon or math.inf
            after = torch.cat([parameter.detach().flatten() for parameter in trainer.adapter.parameters()])
            released = (before - after) / SLOW.learning_rate * BATCH
            score += float(released @ direction) - expected
        scores[present].append(score / (SIGMA * CLIP * math.sqrt(STEPS)))
    return Attack(scores[False], scores[True], reported)


def test_membership_cannot_be_told_beyond_epsilon(base: BaseModel, tmp_path: Path) -> None:
    """At reported ε about 1 the attacker proves less than that, and scores are spread as wide as the noise promises."""
    outcome = attack(base, tmp_path)
    proven = outcome.epsilon_lower_bound()
    logger.info("clipped: %d runs, reported epsilon %.3f, at least %.3f", RUNS, outcome.reported, proven)
    assert 0.9 < outcome.reported < 1.1
    assert proven < outcome.reported
    scores = torch.tensor([*outcome.absent, *(score - MU for score in outcome.present)])
    assert abs(float(scores.mean())) < 4 / math.sqrt(RUNS)
    assert float(scores.std()) == pytest.approx(1.0, abs=4 / math.sqrt(2 * RUNS))


def test_without_clipping_the_canary_shows(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same experiment with clipping switched off finds the leak: the attacker proves more than is reported."""
    bounded = clipping.clip_and_sum
    monkeypatch.setattr(
        clipping, "clip_and_sum", lambda gradients, _, weights=None: bounded(gradients, math.inf, weights)
    )
    outcome = attack(base, tmp_path, clip=math.inf)
    proven = outcome.epsilon_lower_bound()
    logger.info("not clipped: %d runs, reported epsilon %.3f, at least %.3f", RUNS, outcome.reported, proven)
    assert proven > outcome.reported


def test_the_bound_holds_where_the_truth_is_known() -> None:
    """Of 400 attackers on two normal distributions that ε = 1 holds for, at most one in twenty proves more."""
    random, wrong = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        absent, present = torch.randn((2, 100), generator=random, dtype=torch.float64)
        wrong += Attack(absent.tolist(), (present + MU).tolist(), 1.0).epsilon_lower_bound() > 1.0
    assert wrong <= 20
