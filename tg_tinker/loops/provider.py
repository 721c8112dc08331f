"""Who provides a service's trainers and samplers: the control plane, which makes them.

``local`` is the other provider: trainers and samplers at addresses that the caller knows. All coroutines run at home.
"""

from __future__ import annotations

from typing import Protocol

import attrs

from tg_tinker.core.call import call
from tg_tinker.core.run import RunCore
from tg_tinker.loops import plane
from tg_tinker.types import arguments
from tg_tinker.wire import loops

__all__ = ["ControlPlane", "Provider"]


class Provider(Protocol):
    """Hands out trainers and samplers; ``timeout`` is in seconds of the server's silence."""

    async def create_trainer(self, core: RunCore, request: loops.TrainerRequest, timeout: float) -> loops.Run:
        """A trainer as asked for; at an address of another server it may still have to be set up."""
        ...

    async def find_trainer(self, core: RunCore, run_id: str | None) -> loops.Run:
        """A live trainer, as it is. Raises ``ResourceNotFoundError`` where there is none."""
        ...

    async def open_sampler(self, core: RunCore, request: loops.SamplerRequest, timeout: float) -> loops.Sampler:
        """The sampler of a run, a base model or a checkpoint."""
        ...

    async def check_checkpoint(self, core: RunCore, path: str, run_id: str) -> None:
        """Raise ``ResourceNotFoundError`` where nothing that can be sampled from is saved at ``path``."""
        ...


class ControlPlane:
    """``/v1/loops``: what is made by one client belongs to one session."""

    def __init__(self) -> None:
        self._session: str | None = None

    async def create_trainer(self, core: RunCore, request: loops.TrainerRequest, timeout: float) -> loops.Run:
        """See ``Provider``."""
        if self._session is None:
            self._session = (await core.perform(call(loops.CREATE_SESSION, {}))).session.id
        body = plane.fields(attrs.evolve(request, session_id=self._session))
        return (await core.perform(call(loops.CREATE_TRAINER, body, timeout=timeout))).run

    async def find_trainer(self, core: RunCore, run_id: str | None) -> loops.Run:
        """See ``Provider``."""
        return (await core.perform(call(loops.GET_RUN, parts={"id": arguments.text("run_id", run_id)}))).run

    async def open_sampler(self, core: RunCore, request: loops.SamplerRequest, timeout: float) -> loops.Sampler:
        """See ``Provider``."""
        envelope = await core.perform(call(loops.CREATE_SAMPLER, plane.fields(request), timeout=timeout))
        return envelope.sampler

    async def check_checkpoint(self, core: RunCore, path: str, run_id: str) -> None:
        """See ``Provider``."""
        await core.perform(call(loops.CHECKPOINT_VALIDATE, {"checkpoint_path": path, "run_id": run_id}))
