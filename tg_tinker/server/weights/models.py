"""Base models in memory: loaded once each, in a worker thread, shared by all runs and samplers, unloaded after them."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import attrs

from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.server.engine import Engine
from tg_tinker.server.settings import Settings
from tg_tinker.server.work.scheduler import Scheduler
from tg_tinker.types import checks

if TYPE_CHECKING:
    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.sampling.sampler import Sampler

Key = tuple[str, str]  # a reference and a precision
_LONG_TEXT = 20_000  # characters; a longer text is encoded in a thread


@attrs.frozen(eq=False)
class Model:
    """A base model and the one sampler that serves it."""

    ref: str
    base: BaseModel
    sampler: Sampler
    _encoding: asyncio.Lock = attrs.field(factory=asyncio.Lock, repr=False)

    async def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a prompt, raw: no chat template."""
        return await asyncio.shield(self._encode(text))  # a thread goes on when who asked is gone, and so must the lock

    async def _encode(self, text: str) -> tuple[int, ...]:
        async with self._encoding:  # the tokenizers library refuses to be used by two threads at once
            encode = self.base.tokenizer.encode
            return tuple(await asyncio.to_thread(encode, text) if len(text) > _LONG_TEXT else encode(text))


class Models:
    """The models of this process.

    A model is held by the runs and samplers on it, and here as long as somebody may soon want it again. What is held
    nowhere any more leaves memory, its sampler the device thread: at once when another model is loaded, else after
    ``settings.idle`` seconds.
    """

    def __init__(self, settings: Settings, engine: Engine, scheduler: Scheduler, report: Callable[[str], None]) -> None:
        self._settings = settings
        self._engine = engine
        self._scheduler = scheduler
        self._report = report
        self._loading: dict[Key, asyncio.Task[Model]] = {}
        self._held: dict[Key, tuple[Model, float]] = {}  # and when it was wanted last
        self._there: WeakValueDictionary[Key, Model] = WeakValueDictionary()

    def loaded(self) -> list[Model]:
        """Every model that is in memory."""
        return list(self._there.values())

    async def get(self, ref: str, dtype: str = "auto") -> Model:
        """The model, loaded if need be; callers that come together share one loading, and a failure is not kept."""
        if not _can_be_named(ref):
            message = f"there is no model {checks.shown(ref)}; no file and no model of the hub can have that name"
            raise ResourceNotFoundError(message, resource_type="model", resource_id=checks.shown(ref))
        if not self._settings.may_load(ref):
            message = f"there is no model {ref!r}; this server loads folders only where its operator allows it"
            raise ResourceNotFoundError(message, resource_type="model", resource_id=ref)
        key = self._same(ref, dtype)
        model = self._there.get(key)
        if model is None:
            return await asyncio.shield(self._loading.get(key) or self._start(key))
        self._held[key] = model, monotonic()
        return model

    async def any(self, ref: str) -> Model:
        """The model in whatever precision it is loaded; for those who want its tokenizer alone."""
        ready = [model for model in self.loaded() if model.ref == ref]
        return ready[0] if ready else await self.get(ref)

    def sweep(self, used: Iterable[Model]) -> None:
        """Let go of what nobody has wanted for a while; ``used`` are those that runs and samplers are on."""
        now, wanted = monotonic(), set(used)
        for key, (model, since) in list(self._held.items()):
            if model in wanted:
                self._held[key] = model, now
            elif since < now - self._settings.idle:
                del self._held[key]

    async def aclose(self) -> None:
        """Stop waiting for what is still loading."""
        for task in self._loading.values():
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)

    def _same(self, ref: str, dtype: str) -> Key:
        """The key of a loaded model that is what this precision would load: "auto" and "fp32" are one on a CPU."""
        for key, model in self._there.items():
            if key[0] == ref and dtype in {key[1], *_precisions(model.base)}:
                return key
        return ref, dtype

    def _start(self, key: Key) -> asyncio.Task[Model]:
        task = asyncio.create_task(self._load(*key), name=f"load {key[0]}")
        self._loading[key] = task
        task.add_done_callback(lambda done: self._loaded(key, done))
        return task

    async def _load(self, ref: str, dtype: str) -> Model:
        await self._make_room()
        base = await asyncio.to_thread(self._engine.load, ref, dtype, self._report)
        sampler = await self._scheduler.call(lambda: self._engine.sampler(base))
        self._scheduler.add_sampler(sampler)
        model = Model(ref, base, sampler)
        weakref.finalize(model, self._scheduler.remove_sampler, sampler).atexit = False
        self._there[ref, dtype] = model
        self._held[ref, dtype] = model, monotonic()
        return model

    async def _make_room(self) -> None:
        """Let go of what nobody uses, for its memory may be needed; the device thread lets go of the samplers first."""
        if self._held:
            self._held.clear()
            await self._scheduler.call(_nothing)

    def _loaded(self, key: Key, task: asyncio.Task[Model]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # whoever waited has been told; if nobody does any more, nobody has to be


def _can_be_named(ref: str) -> bool:
    """Whether this machine takes it for a path at all, there or not."""
    try:
        Path(ref).expanduser().exists()
    except (OSError, RuntimeError):  # too long, or below the home of a user whom nobody knows
        return False
    return True


def _nothing() -> None:
    pass


def _precisions(base: BaseModel) -> set[str]:
    """The names by which a configuration may ask for this very model."""
    name = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(base.dtype), "")
    auto = "bf16" if base.device.type == "cuda" else "fp32"
    return {name, "auto"} if name == auto else {name}
