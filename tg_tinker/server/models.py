"""Base models in memory: loaded once each, in a worker thread, and shared by all runs and samplers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.server.engine import Engine
from tg_tinker.server.scheduler import Scheduler
from tg_tinker.server.settings import Settings

if TYPE_CHECKING:
    from tg_tinker.engine.base_model import BaseModel
    from tg_tinker.engine.sampler import Sampler

_LONG_TEXT = 20_000  # characters; a longer text is encoded in a thread


@attrs.frozen(eq=False)
class Model:
    """A base model and the one sampler that serves it."""

    ref: str
    base: BaseModel
    sampler: Sampler
    _encoding: threading.Lock = attrs.field(factory=threading.Lock, repr=False)

    async def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a prompt, raw: no chat template."""
        return await asyncio.to_thread(self._encode, text) if len(text) > _LONG_TEXT else self._encode(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        with self._encoding:  # the tokenizers library refuses to be used by two threads at once
            return tuple(self.base.tokenizer.encode(text))


class Models:
    """The models that this process has loaded or is loading."""

    def __init__(self, settings: Settings, engine: Engine, scheduler: Scheduler, report: Callable[[str], None]) -> None:
        self._settings = settings
        self._engine = engine
        self._scheduler = scheduler
        self._report = report
        self._loading: dict[tuple[str, str], asyncio.Task[Model]] = {}

    def loaded(self) -> list[Model]:
        """Every model that is ready."""
        return [task.result() for task in self._loading.values() if task.done() and not task.exception()]

    async def get(self, ref: str, dtype: str = "auto") -> Model:
        """The model, loaded if need be; callers that come together share one loading, and a failure is not kept."""
        if not self._settings.may_load(ref):
            message = f"there is no model {ref!r}; this server loads folders only where its operator allows it"
            raise ResourceNotFoundError(message, resource_type="model", resource_id=ref)
        task = self._loading.get((ref, dtype)) or self._same(ref, dtype)
        if task is None:
            task = asyncio.create_task(self._load(ref, dtype), name=f"load {ref}")
            self._loading[ref, dtype] = task
            task.add_done_callback(lambda done: self._forget_failure(ref, dtype, done))
        return await asyncio.shield(task)

    async def any(self, ref: str) -> Model:
        """The model in whatever precision it is loaded; for those who want its tokenizer alone."""
        ready = [model for model in self.loaded() if model.ref == ref]
        return ready[0] if ready else await self.get(ref)

    async def aclose(self) -> None:
        """Stop waiting for what is still loading."""
        for task in self._loading.values():
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)

    def _same(self, ref: str, dtype: str) -> asyncio.Task[Model] | None:
        """A loaded model that is what this precision would load: "auto" and "fp32" are one on a CPU."""
        for (known, _), task in self._loading.items():
            if known == ref and task.done() and not task.exception() and dtype in _precisions(task.result().base):
                return task
        return None

    async def _load(self, ref: str, dtype: str) -> Model:
        base = await asyncio.to_thread(self._engine.load, ref, dtype, self._report)
        sampler = await self._scheduler.call(lambda: self._engine.sampler(base))
        self._scheduler.add_sampler(sampler)
        return Model(ref, base, sampler)

    def _forget_failure(self, ref: str, dtype: str, task: asyncio.Task[Model]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._loading.pop((ref, dtype), None)


def _precisions(base: BaseModel) -> set[str]:
    """The names by which a configuration may ask for this very model."""
    name = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(base.dtype), "")
    auto = "bf16" if base.device.type == "cuda" else "fp32"
    return {name, "auto"} if name == auto else {name}
