"""ε against published accountants: the rows and the pass rule of tests/vectors/epsilon_vectors.json."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mpmath
import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy.accountant import ORDERS, Mechanism, gaussian_epsilon, spent

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "epsilon_vectors.json").read_text(encoding="utf-8"))
ROWS = VECTORS["rows"]
TIGHT = 1e-6  # relative, as the pass rule has it


def uses(row: dict[str, Any]) -> dict[Mechanism, int]:
    """Give a row's releases."""
    return {Mechanism(row["noise_multiplier"], row["sample_rate"]): row["steps"]}


def name(row: dict[str, Any]) -> str:
    """Name a row."""
    return "-".join(str(row[key]) for key in ("noise_multiplier", "sample_rate", "steps", "delta"))


SAMPLED = [row for row in ROWS if row["sample_rate"] < 1.0]
WHOLE = [row for row in ROWS if row["sample_rate"] == 1.0]


@pytest.mark.parametrize("row", SAMPLED, ids=name)
@pytest.mark.parametrize("accountant", ["rdp", "moments", "gdp"])
def test_renyi_epsilon_obeys_the_pass_rule(row: dict[str, Any], accountant: str) -> None:
    """The Rényi bound lies between Opacus' on the same orders and the looser of the two libraries', never too low."""
    epsilon = spent(uses(row), row["delta"], accountant).epsilon
    looser = max(row["dp_accounting_rdp"], row["opacus_rdp"])
    assert row["opacus_rdp_same_orders"] * (1 - TIGHT) <= epsilon <= looser * (1 + TIGHT)
    assert epsilon >= row["opacus_prv_lower"]


@pytest.mark.parametrize("row", SAMPLED, ids=name)
def test_prv_epsilon_obeys_the_pass_rule(row: dict[str, Any]) -> None:
    """The PRV bound is near dp-accounting's PLD or not above Opacus' upper bound, and never below its lower one."""
    epsilon = spent(uses(row), row["delta"], "prv").epsilon
    near = abs(epsilon - row["dp_accounting_pld"]) <= 0.01
    assert near or epsilon <= row["opacus_prv_upper"] * (1 + TIGHT)
    assert epsilon >= row["opacus_prv_lower"]


@pytest.mark.parametrize("row", WHOLE, ids=name)
@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_without_sampling_epsilon_is_exact(row: dict[str, Any], accountant: str) -> None:
    """At sample rate 1 every accountant gives the analytic Gaussian, to nine digits."""
    epsilon = spent(uses(row), row["delta"], accountant).epsilon
    exact = row["exact_analytic_gaussian"]
    assert exact * (1 - 1e-9) <= epsilon <= exact * (1 + 1e-9)


@pytest.mark.parametrize("case", VECTORS["heterogeneous"], ids=lambda case: f"{case['name']}-{case['delta']}")
def test_different_steps_compose(case: dict[str, Any]) -> None:
    """Steps with different noise and rates compose as the libraries compose them, in any order."""
    releases: Counter[Mechanism] = Counter()
    for sigma, rate, steps in random.Random(0).sample(case["history"], len(case["history"])):
        releases[Mechanism(sigma, rate)] += steps
    epsilon = spent(releases, case["delta"]).epsilon
    assert case["opacus_rdp"] * (1 - TIGHT) <= epsilon <= case["dp_accounting_rdp"] * (1 + TIGHT)
    tighter = spent(releases, case["delta"], "prv").epsilon
    assert case["opacus_prv_lower"] <= tighter <= case["opacus_prv_upper"] * (1 + TIGHT)


@pytest.mark.parametrize("path", VECTORS["trajectories"], ids=lambda path: str(path["noise_multiplier"]))
def test_the_cost_of_single_steps_adds_up(path: dict[str, Any]) -> None:
    """Totals follow the published trajectory, each step costs something, and the steps sum to the total."""
    mechanism, before, costs = Mechanism(path["noise_multiplier"], path["sample_rate"]), 0.0, []
    for point in path["steps"]:
        total = spent({mechanism: point["step"]}, path["delta"]).epsilon
        assert total == pytest.approx(point["total_opacus_rdp"], rel=1e-5)
        costs.append(total - before)
        before = total
    assert all(cost > 0 for cost in costs)
    assert sum(costs) == pytest.approx(before)


def test_orders_reach_1024() -> None:
    """Large noise is not accounted loosely: at σ = 4, q = 0.001, T = 1000 ε is under half of what 63 orders give."""
    assert ORDERS[-1] == 1024
    assert spent({Mechanism(4.0, 0.001): 1000}, 1e-5).epsilon == pytest.approx(0.0487655, rel=1e-3)


def test_tiny_sample_rates_are_not_free() -> None:
    """A sample rate under 1e-6 still costs: σ = 0.3 and a million steps, where a broken accountant says 0."""
    assert spent({Mechanism(0.3, 9e-7): 1_000_000}, 1e-5).epsilon > 5.17


def test_a_step_without_noise_costs_everything() -> None:
    """One release without noise makes the total infinite, whatever surrounds it, for every accountant."""
    releases = {Mechanism(0.0, 0.01): 1, Mechanism(5.0, 0.01): 3}
    for accountant in ("rdp", "moments", "gdp", "prv"):
        assert math.isinf(spent(releases, 1e-5, accountant).epsilon)
    assert spent(releases, 1e-5, "gdp").gdp_epsilon == math.inf


def test_nothing_released_costs_nothing() -> None:
    """Without releases ε is 0."""
    assert spent({}, 1e-5).epsilon == 0.0
    assert spent({Mechanism(1.0, 0.5): 0}, 1e-5, "prv").epsilon == 0.0


def test_an_unknown_accountant_is_refused() -> None:
    """No accountant stands in for another."""
    with pytest.raises(InvalidRequestError) as caught:
        spent({}, 1e-5, "pld")
    assert caught.value.field == "accountant_type"


def test_gdp_reports_a_sound_total_beside_its_own_number() -> None:
    """The accountant "gdp" gives the Rényi bound as the total; the central-limit number, here smaller, is an extra."""
    releases = {Mechanism(1.0, 0.01): 1000}
    both = spent(releases, 1e-5, "gdp")
    assert both.epsilon == spent(releases, 1e-5, "rdp").epsilon
    assert both.gdp_epsilon is not None
    assert both.gdp_epsilon < both.epsilon


def test_the_gdp_number_is_opacus_own() -> None:
    """The central-limit number equals Opacus' formula."""
    from opacus.accountants.analysis.gdp import compute_eps_poisson

    for sigma, rate, steps in ((1.0, 0.01, 1000), (2.0, 0.125, 24), (0.8, 0.05, 100)):
        expected = compute_eps_poisson(steps=steps, noise_multiplier=sigma, sample_rate=rate, delta=1e-5)
        assert spent({Mechanism(sigma, rate): steps}, 1e-5, "gdp").gdp_epsilon == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mu", [1e-6, 1e-3, 0.3, 1.0, 7.0, 60.0, 1e4])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-12])
def test_the_gaussian_curve_is_inverted(mu: float, delta: float) -> None:
    """δ at the returned ε is at most the δ asked for and nearly reaches it, computed here with 60 digits."""
    mpmath.mp.dps = 60
    epsilon = gaussian_epsilon(mu, delta)

    def delta_at(value: float) -> Any:
        e, m = mpmath.mpf(value), mpmath.mpf(mu)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)

    if epsilon == 0.0:
        assert delta_at(0.0) <= delta
    else:
        assert delta_at(epsilon) <= delta * (1 + 1e-6)
        assert delta_at(epsilon * (1 - 1e-9)) >= delta * (1 - 1e-3 if mu > 1e3 else 1 - 1e-6)


def test_prv_above_its_ceiling_is_the_renyi_bound() -> None:
    """Where the PRV computation would overflow, the Rényi bound is given, which also holds."""
    releases = {Mechanism(0.3, 0.2): 500}
    assert spent(releases, 1e-5, "prv").epsilon == spent(releases, 1e-5, "rdp").epsilon > 50


def test_prv_survives_a_vanishing_sample_rate() -> None:
    """At a rate where the quadrature behind PRV fails, the bound that holds is given, not a guess."""
    releases = {Mechanism(1.0, 1e-7): 100}
    assert 0.0 < spent(releases, 1e-5, "prv").epsilon <= spent(releases, 1e-5, "rdp").epsilon


@pytest.mark.parametrize("delta", [1e-300, 1e-16, 0.5, 0.9999])
def test_prv_survives_an_extreme_delta(delta: float) -> None:
    """Where PRV cannot be computed the Rényi bound is given; no total is below zero."""
    releases = {Mechanism(1.0, 0.01): 10}
    assert 0.0 <= spent(releases, delta, "prv").epsilon <= spent(releases, delta, "rdp").epsilon


def test_prv_composes_sampled_and_whole_batches() -> None:
    """One release at rate 1 beside ten at rate 0.01 costs a hundredth at most beyond what a privacy loss grid gives."""
    releases = {Mechanism(1.0, 1.0): 1, Mechanism(1.0, 0.01): 10}
    assert 4.3819 < spent(releases, 1e-5, "prv").epsilon < 4.3819 + 0.011


def test_opacus_is_imported_on_need_alone() -> None:
    """Accounting without sampling needs neither Opacus nor torch."""
    code = (
        "import sys\n"
        "from tg_tinker.privacy.accountant import Mechanism, spent\n"
        "spent({Mechanism(1.0, 1.0): 3}, 1e-5, 'prv')\n"
        "print(sorted({'opacus', 'torch', 'aiohttp'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
