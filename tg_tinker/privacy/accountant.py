"""What a sequence of noisy steps costs: total ε at a given δ.

Without amplification (every sample rate 1) the exact analytic Gaussian; otherwise Rényi or PRV bounds by Opacus, which
is imported on first need. Pure functions; what was released is the ledger's affair.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from typing import TYPE_CHECKING, Any, cast

import attrs

from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

ACCOUNTANTS = ("rdp", "moments", "gdp", "prv")
ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)
PRV_CEILING = 50.0  # above it the PRV computation overflows
PRV_ERROR = 0.01


@attrs.frozen
class Mechanism:
    """One step's release: Gaussian noise of ``noise_multiplier`` times the sensitivity, on a Poisson sample.

    ``sample_rate`` 1 claims no amplification; ``noise_multiplier`` 0 stands for a release without noise.
    """

    noise_multiplier: float
    sample_rate: float


@attrs.frozen
class Spent:
    """Total cost at ``delta``. ``epsilon`` is a sound bound and may be infinite; ``gdp_epsilon`` may under-report."""

    epsilon: float
    delta: float
    gdp_epsilon: float | None = None


def spent(releases: Mapping[Mechanism, int], delta: float, accountant: str = "rdp") -> Spent:
    """Compose releases (how often each mechanism was used) into one guarantee.

    Raises ``InvalidRequestError`` for an unknown accountant: nothing stands in for another.
    """
    if accountant not in ACCOUNTANTS:
        constraint = f"one of {', '.join(ACCOUNTANTS)}"
        raise InvalidRequestError(
            f"accountant_type: expected {constraint}, got {accountant!r}",
            field="accountant_type",
            constraint=constraint,
        )
    return _spent(frozenset((mechanism, times) for mechanism, times in releases.items() if times), delta, accountant)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Invert the privacy curve of μ-Gaussian DP, exactly (Balle and Wang 2018, arXiv:1805.06530, theorem 8)."""
    if mu == 0.0 or _gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    if not math.isfinite(mu):
        return math.inf
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1e-9
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if _gaussian_delta(mu, middle) <= delta else (middle, high)
    return high


@functools.lru_cache(maxsize=1024)  # what is computed ahead on another thread must still be there for many runs
def _spent(items: frozenset[tuple[Mechanism, int]], delta: float, accountant: str) -> Spent:
    used = dict(sorted(items, key=repr))
    total = _epsilon(used, delta, accountant)
    return Spent(total, delta, _gdp_epsilon(used, delta) if accountant == "gdp" else None)


def _epsilon(used: Mapping[Mechanism, int], delta: float, accountant: str) -> float:
    if not used:
        return 0.0
    if any(mechanism.noise_multiplier == 0.0 for mechanism in used):
        return math.inf
    if all(mechanism.sample_rate == 1.0 for mechanism in used):
        # Gaussians compose to one Gaussian: μ² = Σ 1/σ².
        return gaussian_epsilon(math.sqrt(sum(n / m.noise_multiplier**2 for m, n in used.items())), delta)
    bound = _rdp_epsilon(used, delta)
    if accountant == "prv" and bound < PRV_CEILING:
        return min(bound, _prv_epsilon(used, delta))  # both hold, so the smaller one does
    return bound


def _rdp_epsilon(used: Mapping[Mechanism, int], delta: float) -> float:
    """Convert summed Rényi divergences at each order (Balle et al. 2020, arXiv:1905.09982, theorem 21)."""
    curves = [(_rdp_curve(mechanism), times) for mechanism, times in used.items()]
    best = math.inf
    for index, order in enumerate(ORDERS):
        rdp = sum(curve[index] * times for curve, times in curves)
        epsilon = rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        best = min(best, epsilon)
    return max(0.0, best)


@functools.lru_cache(maxsize=256)
def _rdp_curve(mechanism: Mechanism) -> tuple[float, ...]:
    """Give the Rényi divergence of one release at every order; infinite where it cannot be computed."""
    return tuple(_rdp_at(mechanism, order) for order in ORDERS)


def _rdp_at(mechanism: Mechanism, order: float) -> float:
    compute = _opacus("analysis.rdp").compute_rdp
    sigma, rate = mechanism.noise_multiplier, mechanism.sample_rate
    try:
        value = float(compute(q=rate, noise_multiplier=sigma, steps=1, orders=float(order)))
    except (ValueError, OverflowError):
        return math.inf  # the series of this fractional order cancels: dropping an order only loosens the bound
    return value if value >= 0.0 else math.inf


def _prv_epsilon(used: Mapping[Mechanism, int], delta: float) -> float:
    """Bound ε from above by composing privacy random variables (Gopi et al. 2021, arXiv:2106.02848).

    Infinite, which bounds nothing, where it cannot be computed: the quadrature behind it does not converge (sample
    rates around 1e-7), or δ is lost in rounding (under about 1e-14, and near 1).
    """
    unreliable = importlib.import_module("scipy.integrate").IntegrationWarning
    accountant = _opacus("prv").PRVAccountant()
    accountant.history = [(m.noise_multiplier, m.sample_rate, times) for m, times in used.items()]
    with warnings.catch_warnings():
        # It sizes its grid by a Rényi bound and warns that this one is loose, which only costs a larger grid.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        # A release at rate 1 among others: log(1 - rate) is minus infinity, as it should be.
        warnings.filterwarnings("ignore", message="divide by zero", category=RuntimeWarning)
        warnings.simplefilter("error", unreliable)
        try:
            epsilon = float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))
        except (unreliable, ValueError, RuntimeError):
            return math.inf
    return math.inf if math.isnan(epsilon) else max(0.0, epsilon)


def _gdp_epsilon(used: Mapping[Mechanism, int], delta: float) -> float:
    """Approximate by the central limit (Bu et al. 2020, arXiv:1911.11607, corollary 4): not a bound."""
    if any(mechanism.noise_multiplier == 0.0 for mechanism in used):
        return math.inf
    try:
        squares = (times * m.sample_rate**2 * math.expm1(m.noise_multiplier**-2) for m, times in used.items())
        return gaussian_epsilon(math.sqrt(sum(squares)), delta)
    except OverflowError:
        return math.inf


def _gaussian_delta(mu: float, epsilon: float) -> float:
    """Give δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ), factored so that nothing cancels or overflows."""
    upper = _log_normal_cdf(mu / 2 - epsilon / mu)
    lower = epsilon + _log_normal_cdf(-mu / 2 - epsilon / mu)
    return -math.exp(upper) * math.expm1(min(0.0, lower - upper))


def _log_normal_cdf(x: float) -> float:
    return float(importlib.import_module("scipy.special").log_ndtr(x))


@functools.cache
def _opacus(name: str) -> Any:
    try:
        return cast("Any", importlib.import_module(f"opacus.accountants.{name}"))
    except ImportError as error:
        raise InvalidRequestError(
            "accounting for sampled batches needs Opacus: pip install 'tg-tinker[server]'", code="EXTRA_MISSING"
        ) from error
