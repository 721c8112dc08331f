"""Samplers of the Loops surface: each belongs to a run, or serves a base model, or one checkpoint.

A sampler of a run goes with its run. The others keep their base model in memory while they are used; one that nobody
has used for a while lets go of it, and loads it again when it is asked for the next sample.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime
from time import monotonic

import attrs

from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.server.training.runs import Run
from tg_tinker.server.weights.models import Model, Models
from tg_tinker.types import checks
from tg_tinker.wire.checkpoint_uri import CheckpointUri

MOST = 10_000  # samplers without a run; the one used longest ago is forgotten first


@attrs.frozen(eq=False)
class Sampler:
    """Where samples are asked for. A run's own sampler serves what the run publishes."""

    id: str
    tenant: str
    model: Model
    run: Run | None = None
    checkpoint: CheckpointUri | None = None
    created_at: datetime = attrs.field(factory=lambda: datetime.now(UTC))


@attrs.define(eq=False)
class Bare:
    """A sampler without a run, by what it serves; ``awake`` while it holds its model."""

    id: str
    tenant: str
    ref: str
    checkpoint: CheckpointUri | None
    created_at: datetime
    used: float
    awake: Sampler | None

    def wake(self, model: Model) -> Sampler:
        """Hold a model from now on."""
        self.used = monotonic()
        if self.awake is None or self.awake.model is not model:
            self.awake = Sampler(self.id, self.tenant, model, None, self.checkpoint, self.created_at)
        return self.awake


class Samplers:
    """Every sampler of this process, by tenant."""

    def __init__(self) -> None:
        self._of_runs: dict[tuple[str, str], Sampler] = {}
        self._bare: OrderedDict[tuple[str, str], Bare] = OrderedDict()  # the one used last is last
        self._serving: dict[tuple[str, str, CheckpointUri | None], str] = {}  # what is served -> id

    def of_run(self, run: Run) -> Sampler:
        """The run's own sampler."""
        sampler = Sampler(f"smp-{run.id}", run.tenant, run.model, run=run)
        return self._of_runs.setdefault((run.tenant, sampler.id), sampler)

    def of_model(self, tenant: str, model: Model, checkpoint: CheckpointUri | None = None) -> Sampler:
        """The tenant's sampler for a base model, or for a checkpoint on it; made once."""
        served = (tenant, model.ref, checkpoint)
        known = self._serving.get(served)
        if known is None:
            known = self._serving[served] = f"smp-{uuid.uuid4().hex}"
            bare = Bare(known, tenant, model.ref, checkpoint, datetime.now(UTC), monotonic(), None)
            self._bare[tenant, known] = bare
        sampler = self._bare[tenant, known].wake(model)
        self._bare.move_to_end((tenant, known))
        if len(self._bare) > MOST:
            _, oldest = self._bare.popitem(last=False)
            del self._serving[oldest.tenant, oldest.ref, oldest.checkpoint]
        return sampler

    def get(self, tenant: str, sampler_id: str) -> Sampler | Bare:
        """A tenant's sampler, whether or not its model is in memory.

        Raises ``ResourceNotFoundError``.
        """
        sampler = self._of_runs.get((tenant, sampler_id)) or self._bare.get((tenant, sampler_id))
        if sampler is None:
            message = f"no such sampler: {checks.shown(sampler_id)}; create_sampling_client makes a new one"
            raise ResourceNotFoundError(message, resource_type="sampler", resource_id=sampler_id)
        return sampler

    async def awake(self, tenant: str, sampler_id: str, models: Models) -> Sampler:
        """A tenant's sampler, ready to serve: its model is loaded again if need be.

        Raises ``ResourceNotFoundError``.
        """
        sampler = self.get(tenant, sampler_id)
        if isinstance(sampler, Sampler):
            return sampler
        model = await models.get(sampler.ref) if sampler.awake is None else sampler.awake.model
        if (tenant, sampler_id) in self._bare:  # it may have been forgotten while its model was loaded
            self._bare.move_to_end((tenant, sampler_id))
        return sampler.wake(model)

    def forget(self, run: Run) -> None:
        """Drop the sampler of a run that has ended."""
        self._of_runs.pop((run.tenant, f"smp-{run.id}"), None)

    def rest(self, seconds: float) -> None:
        """Let those that nobody has used for so long let go of their models."""
        for bare in self._bare.values():
            if bare.used < monotonic() - seconds:
                bare.awake = None

    def models(self) -> Iterator[Model]:
        """The models that samplers hold."""
        yield from (sampler.model for sampler in self._of_runs.values())
        yield from (bare.awake.model for bare in self._bare.values() if bare.awake is not None)
