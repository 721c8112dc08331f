"""Which weights a sample is served by: the newest version, an exact one, a checkpoint, or the base model alone.

What was deleted, or has expired, is not served any more, whoever deleted it and wherever a copy of it still is.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import attrs

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.server.engine import Engine
from tg_tinker.server.training.runs import Run, Runs
from tg_tinker.server.weights.models import Model
from tg_tinker.server.weights.shelf import Stored
from tg_tinker.server.weights.versions import Version
from tg_tinker.server.work.scheduler import Scheduler
from tg_tinker.wire.checkpoint_uri import SAMPLER_WEIGHTS, CheckpointUri

if TYPE_CHECKING:
    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.store.checkpoints import CheckpointStore, Loaded

KEPT = 8  # adapters of a model, read from disk, that stay in memory
REMEMBERED = 2.0  # seconds that a name is not looked up again


@attrs.frozen(eq=False)
class Weights:
    """What samples: an adapter (None: the base model alone) and the version it goes by."""

    adapter: FrozenAdapter | None
    version: int


Read = OrderedDict[str, "asyncio.Task[Weights]"]  # by artifact; the one used last is last


class Published:
    """Finds adapters for sampling, in memory or on disk."""

    def __init__(self, runs: Runs, store: CheckpointStore, engine: Engine, scheduler: Scheduler) -> None:
        self._runs, self._store, self._engine, self._scheduler = runs, store, engine, scheduler
        self._read: WeakKeyDictionary[Model, Read] = WeakKeyDictionary()
        self._found: dict[tuple[str, CheckpointUri], tuple[float, Stored]] = {}

    async def newest(self, run: Run) -> Weights:
        """The run's newest version; before the first publish the base model alone.

        Raises ``ResourceNotFoundError`` where the newest one was deleted, or has expired.
        """
        return await self.exact(run, run.versions.newest)

    async def exact(self, run: Run, number: int) -> Weights:
        """One version of the run; one that left memory is read back.

        Raises ``ResourceNotFoundError`` for a version that is gone or was never published.
        """
        if number == 0:
            return Weights(None, 0)
        stored = run.versions.shelf.find(number)
        if stored is not None and not self._is_there(run.tenant, stored):
            run.versions.forget(number)
            stored = None
        version = run.versions.get(number)
        if version is not None:
            return _weights(version)
        if stored is not None:
            return await self._from_disk(run.tenant, run.model, stored)
        message = f"version {number} of run {run.id} is not there any more (the newest is {run.versions.newest})"
        raise ResourceNotFoundError(message, resource_type="sampler_version", resource_id=str(number))

    async def checkpoint(self, tenant: str, model: Model, uri: CheckpointUri) -> Weights:
        """The adapter published under a name; the name's newest one, if it was used again."""
        check_serves(uri)
        run = self._runs.find(tenant, uri.run_id)
        number = 0 if run is None else run.named.get((uri.kind, uri.name), ("", 0))[1]
        stored = None if run is None else run.versions.shelf.find(number)
        if run is None or stored is None or not self._is_there(tenant, stored):
            return await self._from_disk(tenant, model, await self._find(tenant, uri))
        version = run.versions.get(number)
        if version is not None and run.model.base is model.base:
            return _weights(version)
        return await self._from_disk(tenant, model, stored)

    def _is_there(self, tenant: str, stored: Stored) -> bool:
        """Whether an artifact may be served. Each sample asks: a look at the disk here costs less than a thread."""
        return not stored.expired and self._store.holds(tenant, stored.artifact_id)

    async def _find(self, tenant: str, uri: CheckpointUri) -> Stored:
        """The artifact behind a name on disk; remembered for a moment, as each sample asks.

        Raises ``ResourceNotFoundError``.
        """
        asked, stored = self._found.get((tenant, uri), (-REMEMBERED, None))
        if stored is None or monotonic() > asked + REMEMBERED or not self._is_there(tenant, stored):
            record = await asyncio.to_thread(self._store.find, tenant, uri.run_id, uri.kind, uri.name)
            stored = Stored.of(record)
            self._found[tenant, uri] = monotonic(), stored
            while len(self._found) > 1000:
                del self._found[next(iter(self._found))]
        return stored

    async def _from_disk(self, tenant: str, model: Model, stored: Stored) -> Weights:
        read = self._read.setdefault(model, OrderedDict())
        task = read.get(stored.artifact_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._load(tenant, model, stored), name=f"read {stored.artifact_id}")
            read[stored.artifact_id] = task
        read.move_to_end(stored.artifact_id)
        while len(read) > KEPT:
            read.popitem(last=False)
        return await asyncio.shield(task)

    async def _load(self, tenant: str, model: Model, stored: Stored) -> Weights:
        loaded: Loaded = await asyncio.to_thread(self._store.load, tenant, stored.artifact_id)
        made = loaded.counters["server"]
        if made["base_digest"] != model.base.digest:
            message = f"path: it was trained on {made['base_model']}, this sampler serves {model.ref}"
            raise InvalidRequestError(message, field="path", constraint=f"an adapter of {model.ref}")
        spec = loaded.counters["spec"]
        thaw: Callable[[], Any] = lambda: self._engine.frozen(model.base, spec, loaded.tensors)  # noqa: E731
        return Weights(await self._scheduler.call(thaw), int(loaded.record.metadata.get("version", 0)))


def check_serves(uri: CheckpointUri) -> None:
    """Refuse a training state where an adapter is asked for; raises ``InvalidRequestError``."""
    if uri.kind != SAMPLER_WEIGHTS:
        message = "path: a training state does not serve sampling; publish it with save_weights_for_sampler"
        raise InvalidRequestError(message, field="path", constraint="bt://loops:<run>/sampler_weights/<name>")


def _weights(version: Version) -> Weights:
    return Weights(version.adapter, version.number)
