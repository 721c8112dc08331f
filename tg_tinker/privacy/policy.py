"""The rules of a private run: what is refused before anything changes, how a step is released, what it reports.

One object per run, used by the device thread alone. It knows no model: examples are arrays here, gradients tensors.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError
from tg_tinker.privacy import noise as noise_source
from tg_tinker.privacy.accountant import Spent, spent
from tg_tinker.privacy.ledger import Ledger, Release
from tg_tinker.types.results import DPMetrics, PrivacyReport
from tg_tinker.wire.digest import tensor_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from tg_tinker.privacy.clipping import Clipped
    from tg_tinker.privacy.settings import PrivacySettings

UNIT = "one row of a batch"
_SLACK = 1.0 + 1e-9  # a budget that is met exactly is met


@attrs.frozen(eq=False)
class Released:
    """A step's gradients, private from here on, and what they cost."""

    gradients: dict[str, Tensor]
    metrics: DPMetrics


@attrs.define
class _StepCounters:
    """What is told about the examples of the step in progress. Not private."""

    examples: int = 0
    clipped: int = 0
    norm_before: float = 0.0
    norm_after: float = 0.0

    def add(self, clipped: Clipped) -> None:
        norms = torch.nan_to_num(clipped.norms.double(), nan=0.0, posinf=0.0)
        self.examples += len(norms)
        self.clipped += clipped.num_clipped
        self.norm_before += float(norms.sum())
        self.norm_after += float((norms * clipped.factors.double()).sum())


class RunPrivacy:
    """Guards one run: admits examples, clips them, releases steps, keeps the ledger."""

    def __init__(self, settings: PrivacySettings, ledger: Ledger, secret: bytes) -> None:
        self.settings = settings
        self.ledger = ledger
        self._secret = secret
        self._digests: set[str] = set()
        self._counters = _StepCounters()

    @property
    def hash_key(self) -> bytes:
        """Key of the run's batch and gradient hashes: an unkeyed hash would be a membership test."""
        return self._subkey("hashes of " + self.ledger.lineage)

    def spent(self) -> Spent:
        """Total so far."""
        return spent(self.ledger.counts(), self.settings.delta, self.settings.accountant)

    @property
    def accounts_slowly(self) -> bool:
        """Whether a total that was not computed before takes long, a tenth of a second to one."""
        return self.settings.accountant == "prv" and self.settings.sample_rate < 1.0

    def account(self, also: Iterable[Mapping[str, Any]] = ()) -> None:
        """Compute the total so far and after one more step, from any thread: who asks next finds them in the cache.

        ``also`` are releases of a checkpoint that is about to be loaded. Raises ``InvalidRequestError`` where one of
        them does not read.
        """
        others = [Release.from_dict(fields) for fields in also]
        for following in (None, self.settings.mechanism()):
            spent(self.ledger.counts(following, others), self.settings.delta, self.settings.accountant)

    def check_budget(self, *, noise: bool = True) -> None:
        """Refuse if one more step would pass the target.

        Raises ``DPBudgetExceededError``; nothing has changed then.
        """
        target = self.settings.target_epsilon
        if target is None:
            return
        counts = self.ledger.counts(and_then=self.settings.mechanism(noise=noise))
        projected = spent(counts, self.settings.delta, self.settings.accountant).epsilon
        if projected > target * _SLACK:
            raise _exceeded(self.spent().epsilon, projected, target, self.settings.delta)

    def check_step(self, step: int) -> None:
        """The same for the step of this number: a replay was paid for; whether it is one, the release will see."""
        if not self.ledger.has_step(step):
            self.check_budget()

    def admit(self, examples: Iterable[Mapping[str, NDArray[Any]]], *, step: int) -> None:
        """Let a batch into step ``step``: one mapping of named arrays per example. All of them enter, or none.

        Raises ``DPBudgetExceededError``, or ``InvalidRequestError`` where an example is in this step already: twice the
        same example is twice the sensitivity.
        """
        self.check_step(step)
        seen, key = set(self._digests), self._subkey("example digests")
        for row, example in enumerate(examples):
            digest = tensor_digest(example, key)
            if digest in seen:
                message = (
                    f"example {row} of the batch is already part of this optimizer step; under differential privacy an "
                    "example may enter a step once"
                )
                raise InvalidRequestError(message, field=f"batch[{row}]", constraint="each example once per step")
            seen.add(digest)
        self._digests = seen

    def count(self, clipped: Clipped) -> None:
        """Note what clipping did, for the step's report."""
        self._counters.add(clipped)

    def discard(self) -> None:
        """Forget the step in progress: its gradients were thrown away and nothing was released."""
        self._digests = set()
        self._counters = _StepCounters()

    @torch.no_grad()
    def release(self, sums: Mapping[str, Tensor], *, step: int, noise: bool = True) -> Released:
        """Make the clipped sums private: check, charge durably, add noise, divide by the expected batch size.

        ``sums`` are zeros where the Poisson draw was empty; ``step`` is the number this step gets. A replay of the same
        step on the same gradients gives the same result and is not charged again. Raises ``DPBudgetExceededError``.
        """
        settings = self.settings
        sigma = settings.mechanism(noise=noise).noise_multiplier
        key = noise_source.step_key(
            self._secret,
            lineage=self.ledger.lineage,
            step=step,
            gradient_digest=tensor_digest({name: _array(tensor) for name, tensor in sums.items()}),
            noise_multiplier=sigma,
            max_grad_norm=settings.max_grad_norm,
        )
        before = self.spent()
        name = noise_source.release_id(key)
        if name not in self.ledger:
            self.check_budget(noise=noise)
        self.ledger.append(self._entry(name, step, sigma))  # also where it is known: an earlier write may have failed
        gradients = _noised(sums, key, sigma * settings.max_grad_norm, settings.expected_batch_size)
        metrics = self._metrics(before, noise_applied=sigma > 0.0)
        self.discard()
        return Released(gradients, metrics)

    def report(self) -> PrivacyReport:
        """Everything about the run's privacy in one look."""
        total, settings = self.spent().epsilon, self.settings
        target = settings.target_epsilon
        return PrivacyReport(
            enabled=True,
            accountant=settings.accountant,
            total_epsilon=_finite(total),
            epsilon_is_infinite=math.isinf(total),
            target_epsilon=target,
            remaining_epsilon=None if target is None else max(0.0, target - total),
            delta=settings.delta,
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=settings.max_grad_norm,
            sample_rate=settings.sample_rate,
            expected_batch_size=settings.expected_batch_size,
            steps=len(self.ledger),
            unit=UNIT,
            warnings=settings.warnings,
        )

    def state(self) -> dict[str, Any]:
        """Give the ledger and the step in progress as JSON data, for a sealed checkpoint."""
        return {
            "ledger": self.ledger.to_list(),
            "max_grad_norm": self.settings.max_grad_norm,
            "examples": sorted(self._digests),
            "counters": attrs.asdict(self._counters),
        }

    def behind(self, state: Mapping[str, Any], origin: str) -> dict[str, Any]:
        """Complete the ledger of a checkpoint of run ``origin`` by what the runs behind it released after it was saved.

        Raises ``InvalidRequestError`` or ``ServerError`` where a ledger does not read. From any thread.
        """
        saved = [Release.from_dict(fields) for fields in state["ledger"]]
        known = {release.release_id for release in saved}
        lineages = sorted({origin, *(release.lineage for release in saved)})
        later = [attrs.asdict(one) for one in self.ledger.others(lineages) if one.release_id not in known]
        return {**state, "ledger": [*state["ledger"], *later]}

    def restore(self, state: Mapping[str, Any], *, with_step: bool) -> None:
        """Unite a checkpoint's ledger with this one: what was released stays released.

        ``with_step`` takes over the step in progress too. Raises ``InvalidRequestError`` where it does not read.
        """
        try:
            releases = [Release.from_dict(fields) for fields in state["ledger"]]
            counters, digests = _StepCounters(**state["counters"]), set(map(str, state["examples"]))
        except (KeyError, TypeError) as error:
            raise InvalidRequestError("the checkpoint's privacy ledger cannot be read", field="ledger") from error
        self.ledger.unite(releases)
        self.discard()
        if with_step:
            self._counters, self._digests = counters, digests

    def _subkey(self, label: str) -> bytes:
        return hmac.new(self._secret, b"tg-tinker " + label.encode(), hashlib.sha256).digest()

    def _entry(self, name: str, step: int, sigma: float) -> Release:
        return Release(
            release_id=name,
            lineage=self.ledger.lineage,
            step=step,
            noise_multiplier=sigma,
            max_grad_norm=self.settings.max_grad_norm,
            sample_rate=self.settings.sample_rate,
        )

    def _metrics(self, before: Spent, *, noise_applied: bool) -> DPMetrics:
        after, counters = self.spent(), self._counters
        examples = max(1, counters.examples)
        return DPMetrics(
            noise_applied=noise_applied,
            epsilon_spent=_finite(
                max(0.0, after.epsilon - before.epsilon) if math.isfinite(after.epsilon) else math.inf
            ),
            total_epsilon=_finite(after.epsilon),
            delta=self.settings.delta,
            grad_norm_before_clip=counters.norm_before / examples,
            grad_norm_after_clip=counters.norm_after / examples,
            num_clipped=counters.clipped,
            epsilon_is_infinite=math.isinf(after.epsilon),
            gdp_epsilon=None if after.gdp_epsilon is None else _finite(after.gdp_epsilon),
        )


def _noised(sums: Mapping[str, Tensor], key: bytes, std: float, divisor: float) -> dict[str, Tensor]:
    """Add noise in float64, names sorted, and round once at the end."""
    stream = noise_source.NoiseStream(key)
    private: dict[str, Tensor] = {}
    for name in sorted(sums):
        total = sums[name].to(torch.float64)
        if std > 0.0:
            drawn = torch.from_numpy(stream.normal(total.numel())).to(total.device)
            total = total + drawn.view(total.shape) * std
        private[name] = (total / divisor).to(sums[name].dtype)
    return private


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def _exceeded(current: float, projected: float, target: float, delta: float) -> DPBudgetExceededError:
    message = (
        f"the privacy budget is ε = {target:g} at δ = {delta:g}; ε is {_said(current)}, "
        f"and one more step makes it {_said(projected)}"
    )
    return DPBudgetExceededError(
        message, current_epsilon=current, max_epsilon=target, projected_epsilon=projected, delta=delta
    )


def _said(epsilon: float) -> str:
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "infinite"
