"""The engine as the server sees it: one small interface, so that handlers can be tested without a model.

``TorchEngine`` is the real one. torch is imported on use, in threads, so that a server answers before it is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tg_tinker.server.cpu_threads import CpuThreads
from tg_tinker.types.batch import BatchData
from tg_tinker.types.loops import Datum

if TYPE_CHECKING:
    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.sampling.generation import GenerationRequest
    from tg_tinker.engine.sampling.sampler import Sampler
    from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
    from tg_tinker.engine.training.trainer import Trainer, TrainerState


class Engine(Protocol):
    """Makes the engine's objects. ``load`` runs in worker threads, the rest on the device thread."""

    def warm(self) -> None:
        """Do what takes long and can be done before it is needed."""
        ...

    def prepare_thread(self) -> None:
        """Set the calling thread up for model work."""
        ...

    def load(self, ref: str, dtype: str, progress: Callable[[str], None]) -> BaseModel:
        """Load a base model."""
        ...

    def sampler(self, base: BaseModel) -> Sampler:
        """A sampler for all runs on this model."""
        ...

    def trainer(self, base: BaseModel, spec: Mapping[str, Any], **options: Any) -> Trainer:
        """A run; ``spec`` are the fields of an ``AdapterSpec``."""
        ...

    def rows(self, examples: BatchData | Sequence[Datum]) -> list[Any]:
        """Training rows of a TG batch or of datums."""
        ...

    def optimizer(self, **fields: Any) -> OptimizerSettings:
        """Checked settings of an optimizer step."""
        ...

    def generation(self, **fields: Any) -> GenerationRequest:
        """A request to sample."""
        ...

    def state(self, tensors: Mapping[str, Any], counters: Mapping[str, Any]) -> TrainerState:
        """A trainer's state, as it was stored."""
        ...

    def frozen(self, base: BaseModel, spec: Mapping[str, Any], tensors: Mapping[str, Any]) -> FrozenAdapter:
        """A published adapter, as it was stored."""
        ...


class TorchEngine:
    """The engine of this package."""

    def __init__(self, *, home: Path, device: str = "auto", threads: int | None = None, slots: int = 64) -> None:
        self._home = home
        self._device = device
        self._threads = CpuThreads(threads)
        self._slots = slots

    def warm(self) -> None:
        """Import torch, transformers and the engine, without looking for garbage that imports do not make.

        Raises ``InvalidRequestError`` where the device is not here.
        """
        collecting = gc.isenabled()
        gc.disable()  # it would take a quarter of the time
        try:
            from tg_tinker.engine.models import base_model
            from tg_tinker.engine.sampling import sampler
            from tg_tinker.engine.training import trainer
        finally:
            gc.freeze()  # a million objects that stay: every later collection would go through them for half a second
            if collecting:
                gc.enable()
        del sampler, trainer
        base_model.find_device(self._device)

    def prepare_thread(self) -> None:
        """Set the number of threads that torch uses from the calling thread."""
        self._threads.prepare()

    def load(self, ref: str, dtype: str, progress: Callable[[str], None]) -> BaseModel:
        """Load a base model from the hub, a folder, or by its built-in name."""
        from tg_tinker.engine.models import base_model

        return base_model.load(ref, home=self._home, device=self._device, dtype=dtype, progress=progress)

    def sampler(self, base: BaseModel) -> Sampler:
        """A continuous-batching sampler; the first thing that the device thread learns of a model."""
        from tg_tinker.engine.sampling.sampler import Sampler

        self._threads.fit(base)
        return Sampler(base, slots=self._slots)

    def trainer(self, base: BaseModel, spec: Mapping[str, Any], **options: Any) -> Trainer:
        """A LoRA run."""
        from tg_tinker.engine.lora.adapters import AdapterSpec
        from tg_tinker.engine.training.trainer import Trainer

        return Trainer(base, AdapterSpec(**spec), **options)

    def rows(self, examples: BatchData | Sequence[Datum]) -> list[Any]:
        """Rows as ``engine.training.batching`` makes them."""
        from tg_tinker.engine.training import batching

        return (
            batching.rows_from_batch(examples) if isinstance(examples, BatchData) else batching.rows_from_data(examples)
        )

    def optimizer(self, **fields: Any) -> OptimizerSettings:
        """Settings of ``engine.training.optimizer_settings``."""
        from tg_tinker.engine.training.optimizer_settings import OptimizerSettings

        return OptimizerSettings(**fields)

    def generation(self, **fields: Any) -> GenerationRequest:
        """A request of ``engine.sampling.generation``."""
        from tg_tinker.engine.sampling.generation import GenerationRequest

        return GenerationRequest(**fields)

    def state(self, tensors: Mapping[str, Any], counters: Mapping[str, Any]) -> TrainerState:
        """A state of ``engine.training.trainer``."""
        from tg_tinker.engine.training.trainer import TrainerState

        return TrainerState(tensors=dict(tensors), counters=dict(counters))

    def frozen(self, base: BaseModel, spec: Mapping[str, Any], tensors: Mapping[str, Any]) -> FrozenAdapter:
        """An adapter for sampling, checked against the model it is for."""
        from tg_tinker.engine.lora import adapters

        adapter = adapters.create(base, adapters.AdapterSpec(**spec))
        adapter.load(tensors)
        return adapter.snapshot()
