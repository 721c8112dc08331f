"""Differential privacy in a run: joins the rules of ``privacy`` to a trainer. Device thread only.

What is refused, clipped, noised and charged is decided there; which tensors these are is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import checks
from tg_tinker.types.batch import IGNORED
from tg_tinker.types.config import DPConfig
from tg_tinker.types.losses import spec_of
from tg_tinker.types.results import DPMetrics, PrivacyReport
from tg_tinker.wire.digest import tensor_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from tg_tinker.engine.lora.adapters import Adapter
    from tg_tinker.engine.lora.lora_linear import GradientFactors
    from tg_tinker.engine.training.batching import Row
    from tg_tinker.engine.training.collation import MicroBatch
    from tg_tinker.engine.training.trainer import Trainer
    from tg_tinker.privacy.clipping import Clipped, ExampleClipper
    from tg_tinker.privacy.policy import RunPrivacy

PAIRED_LOSSES = ("dpo",)
_NO_SUMS = (
    "loss_fn_config.skip_token_normalization: under differential privacy a loss is the mean over an example's tokens; "
    "a loss of your own (forward_backward_custom) could make one example's part depend on another's, and is refused"
)


class PrivateTraining:
    """What a run with differential privacy does differently from one without."""

    def __init__(self, policy: RunPrivacy, unit: str) -> None:
        self.policy = policy
        self._unit = unit
        self.dp_metrics = self._listed(None)  # read from other threads: replaced whole, never changed

    @classmethod
    def open(
        cls, config: DPConfig, *, run_id: str, home: Path, default_batch_size: int | None, unit: str
    ) -> PrivateTraining:
        """Complete the settings and open the ledger; imports what accounting needs, so not for the event loop."""
        from tg_tinker.privacy.ledger import Ledger
        from tg_tinker.privacy.policy import RunPrivacy
        from tg_tinker.privacy.settings import PrivacySettings
        from tg_tinker.store import files

        settings = PrivacySettings.of(config, default_batch_size=default_batch_size)
        secret = files.secret(home / "secrets" / "noise-secret")
        policy = RunPrivacy(settings, Ledger(home / "ledgers", run_id), secret)
        policy.account()  # imports Opacus, if anything does: the device thread must not wait for that
        return cls(policy, unit)

    @property
    def hash_key(self) -> bytes:
        """Key of the run's hashes."""
        return self.policy.hash_key

    @property
    def noise(self) -> dict[str, Any]:
        """What the noise of a step follows from, beside its gradient and the server's secret, as JSON data."""
        settings = self.policy.settings
        names = ("noise_multiplier", "max_grad_norm", "expected_batch_size")
        return {"lineage": self.policy.ledger.lineage, **{name: getattr(settings, name) for name in names}}

    def attach(self, trainer: Trainer) -> None:
        """Let every training pass of this trainer clip its gradients by example.

        Dropout by row keeps an example from changing the others' gradients: a mask drawn for the batch would shift.
        Raises ``InvalidRequestError`` where it trains more than an adapter: nothing would clip those gradients.
        """
        if trainer.adapter.saved:
            raise checks.refuse("modules_to_save", "nothing under differential privacy", list(trainer.adapter.saved))
        trainer.per_example, trainer.dropout_by_row = self._recorder, True

    def admit(self, rows: Sequence[Row], loss_fn: str, config: Mapping[str, Any] | None, *, step: int) -> None:
        """Refuse a pass that the budget, the loss or an example used twice forbids; nothing has changed then."""
        spec = spec_of(loss_fn)
        if loss_fn in PAIRED_LOSSES:
            message = f"loss_fn: {loss_fn} compares two examples, and differential privacy here protects single ones"
            raise InvalidRequestError(message, field="loss_fn", constraint="a loss of single examples")
        if config and config.get("skip_token_normalization"):
            raise InvalidRequestError(_NO_SUMS, field="loss_fn_config.skip_token_normalization", constraint="False")
        names = {*spec.required, *spec.optional} - {"target_tokens"}
        self.policy.admit([_as_read(row, names) for row in rows], step=step)

    def discard(self) -> None:
        """The gradients of the step in progress were thrown away."""
        self.policy.discard()

    def release(self, trainer: Trainer, *, noise: bool) -> DPMetrics:
        """Replace the clipped sums by a private gradient, charged durably; the optimizer then takes it as it is.

        Raises ``DPBudgetExceededError``; nothing has changed then.
        """
        sums = _sums(trainer)
        released = self.policy.release(sums, step=trainer.step + 1, noise=noise)
        for name, parameter in trainer.adapter.parameter_dict().items():
            parameter.grad = released.gradients[name]
        trainer.gradients.passes, trainer.gradients.normalised = 1, False
        self.dp_metrics = self._listed(released.metrics)
        return released.metrics

    def gradient_hash(self, trainer: Trainer) -> str:
        """Digest the gathered gradient under the run's key."""
        return tensor_digest({name: tensor.cpu().numpy() for name, tensor in _sums(trainer).items()}, self.hash_key)

    def state(self) -> dict[str, Any]:
        """The ledger and the step in progress, for a sealed checkpoint."""
        return self.policy.state()

    def restore(self, state: Mapping[str, Any], *, with_step: bool) -> bool:
        """Take a checkpoint's releases in, durably; say whether its step in progress can be gone on with.

        It cannot where its gradients were not clipped as this run clips.
        """
        same = with_step and state.get("max_grad_norm") == self.policy.settings.max_grad_norm
        self.policy.restore({"counters": {}, "examples": [], **state}, with_step=same)
        self.dp_metrics = self._listed(None)
        return same

    def report(self) -> PrivacyReport:
        """The ledger in one look."""
        return attrs.evolve(self.policy.report(), unit=self._unit)

    def _listed(self, last: DPMetrics | None) -> dict[str, Any]:
        report = self.policy.report()
        return {
            "total_epsilon": report.total_epsilon,
            "epsilon_is_infinite": report.epsilon_is_infinite,
            "delta": report.delta,
            "target_epsilon": report.target_epsilon,
            "num_steps": report.steps,
            "warnings": list(self.policy.settings.warnings),
            "last_step": None if last is None else last.to_dict(),
        }

    def _recorder(self, batch: MicroBatch) -> _Recorder:
        import torch

        from tg_tinker.privacy.clipping import ExampleClipper

        active = batch.mask if batch.mask.dim() == 1 else batch.mask.any(dim=1)
        counts = [int(part.sum()) for part in active.split(batch.inputs["lengths"].tolist())]
        weights = torch.tensor([1.0 / max(1, count) for count in counts], device=active.device, dtype=torch.float64)
        clipper = ExampleClipper(len(counts), self.policy.settings.max_grad_norm, weights)
        return _Recorder(clipper, self.policy.count)


class _Recorder:
    """Clips one micro-batch: an example's loss is the mean over its active tokens."""

    def __init__(self, clipper: ExampleClipper, count: Callable[[Clipped], None]) -> None:
        self._clipper = clipper
        self._count = count

    def record(self, layer: str, factors: GradientFactors) -> None:
        """Keep the factors of one layer's gradients."""
        self._clipper.record(layer, factors)

    def finish(self, adapter: Adapter) -> None:
        """Add the clipped sums to the gradient."""
        clipped = self._clipper.clip()
        self._count(clipped)
        for layer, (a, b) in adapter.layers.items():
            if layer in clipped.sums:
                for parameter, clipped_sum in zip((a, b), clipped.sums[layer], strict=True):
                    added = clipped_sum.to(parameter.dtype)
                    parameter.grad = added if parameter.grad is None else parameter.grad + added


def _as_read(row: Row, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """An example as its loss reads it: two that differ only in what it ignores are the same example."""
    return {"tokens": row.tokens, "targets": row.targets, **{name: _input_as_read(row, name) for name in names}}


def _input_as_read(row: Row, name: str) -> NDArray[Any]:
    """One input, 0 where there is no target; one that is absent counts as ones. What misfits is refused later on."""
    import numpy as np

    read = row.labelled if name == "temperatures" else row.targets != IGNORED
    values = np.asarray(row.inputs.get(name, np.ones(read.shape)), np.float64)
    return np.where(read, values, 0.0) if values.shape == read.shape else values


def _sums(trainer: Trainer) -> dict[str, Tensor]:
    import torch

    return {
        name: torch.zeros_like(parameter.detach()) if parameter.grad is None else parameter.grad
        for name, parameter in trainer.adapter.parameter_dict().items()
    }
