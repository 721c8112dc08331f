"""Samplers of the Loops surface: each belongs to a run, or serves a base model, or one checkpoint."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import attrs

from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.server.checkpoint_uri import CheckpointUri
from tg_tinker.server.models import Model
from tg_tinker.server.runs import Run


@attrs.frozen(eq=False)
class Sampler:
    """Where samples are asked for. A run's own sampler serves what the run publishes."""

    id: str
    tenant: str
    model: Model
    run: Run | None = None
    checkpoint: CheckpointUri | None = None
    created_at: datetime = attrs.field(factory=lambda: datetime.now(UTC))


class Samplers:
    """Every sampler of this process, by tenant."""

    def __init__(self) -> None:
        self._samplers: dict[tuple[str, str], Sampler] = {}

    def of_run(self, run: Run) -> Sampler:
        """The run's own sampler."""
        return self._keep(Sampler(f"smp-{run.id}", run.tenant, run.model, run=run))

    def of_model(self, tenant: str, model: Model, checkpoint: CheckpointUri | None = None) -> Sampler:
        """A sampler for a base model, or for a checkpoint on it."""
        return self._keep(Sampler(f"smp-{uuid.uuid4().hex}", tenant, model, checkpoint=checkpoint))

    def get(self, tenant: str, sampler_id: str) -> Sampler:
        """A tenant's sampler.

        Raises ``ResourceNotFoundError``.
        """
        sampler = self._samplers.get((tenant, sampler_id))
        if sampler is None:
            raise ResourceNotFoundError("no such sampler", resource_type="sampler", resource_id=sampler_id)
        return sampler

    def forget(self, run: Run) -> None:
        """Drop the sampler of a run that has ended."""
        self._samplers.pop((run.tenant, f"smp-{run.id}"), None)

    def _keep(self, sampler: Sampler) -> Sampler:
        return self._samplers.setdefault((sampler.tenant, sampler.id), sampler)
