"""Trainers and samplers at known addresses: ``ServiceClient.local``.

The addresses may be those of our server (then its control plane is asked too) or of published workers, which know no
run: for these an id is drawn, because checkpoints are named by it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import attrs

from tg_tinker.core.call import call
from tg_tinker.core.run import RunCore
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.loops.provider import ControlPlane
from tg_tinker.types import arguments, checks
from tg_tinker.wire import loops

__all__ = ["LocalPlane"]

T = TypeVar("T")
_OURS = re.compile(r"(?P<server>.*)/loops/(?:trainers|samplers)/(?P<id>[^/]+)")
_MADE_ALREADY = ("seed", "name", "dp_config")  # what a worker cannot be told any more
_ACTIVE = loops.StatusName(name="ACTIVE")


def _url(field: str, value: object) -> str | None:
    if value is None:
        return None
    text = arguments.text(field, value)
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise checks.refuse(field, 'a URL such as "http://host:port"', value)
    return text.rstrip("/")


@attrs.frozen
class LocalPlane:
    """One trainer and one sampler, either of which may be missing; see ``Provider`` for what it does."""

    trainer_url: str | None
    sampler_url: str | None
    run_id: str
    _control: ControlPlane = attrs.field(factory=ControlPlane, eq=False, repr=False)

    @classmethod
    def at(cls, trainer_url: object, sampler_url: object, run_id: object) -> LocalPlane:
        """The two addresses, checked; the run's id is read from ours, or drawn, where it is not given."""
        trainer, sampler = _url("trainer_url", trainer_url), _url("sampler_url", sampler_url)
        if trainer is None and sampler is None:
            raise checks.refuse("trainer_url", "the URL of a trainer, or sampler_url beside it", trainer_url)
        ours = _OURS.fullmatch(trainer or "")
        known = ours["id"] if ours else f"local-{uuid.uuid4().hex[:12]}"
        return cls(trainer, sampler, arguments.optional_text("run_id", run_id) or known)

    @property
    def server(self) -> str:
        """Where a control plane would be: before the path of our addresses, at the root of others."""
        url = self.trainer_url or self.sampler_url or ""
        ours, parts = _OURS.fullmatch(url), urlsplit(url)
        return ours["server"] if ours else f"{parts.scheme}://{parts.netloc}"

    async def create_trainer(self, core: RunCore, request: loops.TrainerRequest, timeout: float) -> loops.Run:  # noqa: ARG002 - see Provider
        """The trainer, which the caller then gives a fresh adapter of the rank that was asked for."""
        for field in _MADE_ALREADY:
            if getattr(request, field) is not None:
                raise checks.refuse(field, "None: the trainer at trainer_url is there already", getattr(request, field))
        found = await self._run(core)
        if found is None:
            return self._made_up(request.base_model)
        if found.base_model != request.base_model:
            raise checks.refuse("base_model", f"{found.base_model!r}, which that trainer trains", request.base_model)
        return attrs.evolve(found, base_url=self._trainer(), lora_rank=None)

    async def find_trainer(self, core: RunCore, run_id: str | None) -> loops.Run:
        """The trainer as it is; a published one does not tell its rank."""
        if run_id not in {None, self.run_id}:
            message = f"this client's trainer has run {self.run_id}, not {run_id}"
            raise ResourceNotFoundError(message, resource_type="run", resource_id=str(run_id))
        found = await self._run(core)
        if found is None:
            return self._made_up((await self._served(core))[0])
        return attrs.evolve(found, base_url=self._trainer())

    async def open_sampler(self, core: RunCore, request: loops.SamplerRequest, timeout: float) -> loops.Sampler:
        """The sampler at its address; without one, our server is asked for the run's own."""
        if self.sampler_url is None:
            opened = await self._if_ours(self._control.open_sampler(core, request, timeout))
            if opened is None:
                raise checks.refuse("sampler_url", "the URL of a sampler: this server hands out none", None)
            return opened
        served = await self._served(core)
        if request.base_model is not None and request.base_model not in served:
            raise checks.refuse("base_model", f"what the sampler serves, {', '.join(served)}", request.base_model)
        ours = _OURS.fullmatch(self.sampler_url)
        return loops.Sampler(
            id=ours["id"] if ours else "local",
            base_url=self.sampler_url,
            base_model=request.base_model or served[0],
            created_at=datetime.now(UTC),
            status=_ACTIVE,
        )

    async def check_checkpoint(self, core: RunCore, path: str, run_id: str) -> None:
        """As the control plane says; where there is none, the first sample tells."""
        await self._if_ours(self._control.check_checkpoint(core, path, run_id))

    # -------------------------------------------------------------------------------------- how it is done

    def _trainer(self) -> str:
        if self.trainer_url is None:
            raise checks.refuse("trainer_url", "the URL of a trainer", None)
        return self.trainer_url

    def _made_up(self, base_model: str) -> loops.Run:
        return loops.Run(
            id=self.run_id,
            session_id=None,
            base_model=base_model,
            base_url=self._trainer(),
            created_at=datetime.now(UTC),
            status=_ACTIVE,
        )

    async def _run(self, core: RunCore) -> loops.Run | None:
        """What a control plane knows of the run; None where there is no such plane."""
        self._trainer()
        return await self._if_ours(self._control.find_trainer(core, self.run_id))

    async def _served(self, core: RunCore) -> list[str]:
        """The base models that the sampler serves."""
        if self.sampler_url is None:
            raise checks.refuse("sampler_url", "the URL of a sampler, which knows the trainer's base model", None)
        answer = await core.perform(call(loops.MODELS, base=self.sampler_url))
        names = [str(one["id"]) for one in answer.get("data", ()) if not one.get("parent")]
        if not names:
            raise InvalidRequestError(f"the sampler at {self.sampler_url} names no base model", field="sampler_url")
        return names

    async def _if_ours(self, asked: Coroutine[Any, Any, T]) -> T | None:
        """The answer of a control plane; None where nobody there knows the question."""
        try:
            return await asked
        except ResourceNotFoundError as error:
            if error.resource_type is not None:
                raise
            return None
