"""Which weights a sample is served by: the newest version, an exact one, a checkpoint, or the base model alone."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.server.checkpoint_uri import SAMPLER_WEIGHTS, CheckpointUri
from tg_tinker.server.models import Model
from tg_tinker.server.runs import Run
from tg_tinker.server.versions import Version

if TYPE_CHECKING:
    from tg_tinker.engine.adapters import FrozenAdapter
    from tg_tinker.server.rooms import Rooms
    from tg_tinker.store.checkpoints import Loaded

KEPT = 8  # adapters read from disk that stay in memory
REMEMBERED = 2.0  # seconds that a name is not looked up again


@attrs.frozen(eq=False)
class Weights:
    """What samples: an adapter (None: the base model alone) and the version it goes by."""

    adapter: FrozenAdapter | None
    version: int


class Published:
    """Finds adapters for sampling, in memory or on disk."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._read: OrderedDict[tuple[Model, str], asyncio.Task[Weights]] = OrderedDict()
        self._found: dict[tuple[str, CheckpointUri], tuple[float, str]] = {}

    def newest(self, run: Run) -> Weights:
        """The run's newest version; before the first publish the base model alone."""
        version = run.versions.get(run.versions.newest)
        return Weights(None, 0) if version is None else _weights(version)

    async def exact(self, run: Run, number: int) -> Weights:
        """One version of the run; one that left memory is read back, where its name has not moved on.

        Raises ``ResourceNotFoundError`` for a version that is gone or was never published.
        """
        if number == 0:
            return Weights(None, 0)
        version = run.versions.get(number)
        if version is not None:
            return _weights(version)
        records = await asyncio.to_thread(self._rooms.store.list, run.tenant, run.id)
        for record in records:
            if record.kind == SAMPLER_WEIGHTS and record.metadata.get("version") == number:
                return await self._from_disk(run.tenant, run.model, record.artifact_id)
        message = f"version {number} of run {run.id} is no longer served (the newest is {run.versions.newest})"
        raise ResourceNotFoundError(message, resource_type="sampler_version", resource_id=str(number))

    async def checkpoint(self, tenant: str, model: Model, uri: CheckpointUri) -> Weights:
        """The adapter published under a name; the name's newest one, if it was used again."""
        if uri.kind != SAMPLER_WEIGHTS:
            message = "path: a training state does not serve sampling; publish it with save_weights_for_sampler"
            raise InvalidRequestError(message, field="path", constraint="bt://loops:<run>/sampler_weights/<name>")
        run = self._rooms.runs.find(tenant, uri.run_id)
        if run is not None and (uri.kind, uri.name) in run.named:
            artifact_id, number = run.named[uri.kind, uri.name]
            version = run.versions.get(number)
            if version is not None and run.model.base is model.base:
                return _weights(version)
        else:
            artifact_id = await self._find(tenant, uri)
        return await self._from_disk(tenant, model, artifact_id)

    async def _find(self, tenant: str, uri: CheckpointUri) -> str:
        """The artifact behind a URI of a run that is not live here; remembered for a moment, as each sample asks."""
        asked, artifact_id = self._found.get((tenant, uri), (-REMEMBERED, ""))
        if monotonic() > asked + REMEMBERED:
            record = await asyncio.to_thread(self._rooms.store.find, tenant, uri.run_id, uri.kind, uri.name)
            artifact_id = record.artifact_id
            self._found[tenant, uri] = monotonic(), artifact_id
            while len(self._found) > 1000:
                del self._found[next(iter(self._found))]
        return artifact_id

    async def _from_disk(self, tenant: str, model: Model, artifact_id: str) -> Weights:
        task = self._read.get((model, artifact_id))
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._load(tenant, model, artifact_id), name=f"read {artifact_id}")
            self._read[model, artifact_id] = task
        self._read.move_to_end((model, artifact_id))
        while len(self._read) > KEPT:
            self._read.popitem(last=False)
        return await asyncio.shield(task)

    async def _load(self, tenant: str, model: Model, artifact_id: str) -> Weights:
        loaded: Loaded = await asyncio.to_thread(self._rooms.store.load, tenant, artifact_id)
        made = loaded.counters["server"]
        if made["base_digest"] != model.base.digest:
            message = f"path: it was trained on {made['base_model']}, this sampler serves {model.ref}"
            raise InvalidRequestError(message, field="path", constraint=f"an adapter of {model.ref}")
        spec = {**loaded.counters["spec"]}
        spec["target_modules"] = None if spec["target_modules"] is None else tuple(spec["target_modules"])
        thaw: Callable[[], Any] = lambda: self._rooms.engine.frozen(model.base, spec, loaded.tensors)  # noqa: E731
        return Weights(await self._rooms.scheduler.call(thaw), int(loaded.record.metadata.get("version", 0)))


def _weights(version: Version) -> Weights:
    return Weights(version.adapter, version.number)
