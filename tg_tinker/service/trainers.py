"""What a ``ServiceClient`` offers of Loops trainers: made, made from a checkpoint, taken up as they are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, Literal, Self

import attrs

from tg_tinker import settings
from tg_tinker.core.call import Call, Flow, call
from tg_tinker.faces import blocking, twin
from tg_tinker.loops import hosted, plane
from tg_tinker.loops.local import LocalPlane
from tg_tinker.loops.provider import ControlPlane, Provider
from tg_tinker.loops.tracking import Tracker, WandbConfig, tracker_of
from tg_tinker.loops.training import TrainingClient
from tg_tinker.loops.waits import Waits
from tg_tinker.service.base import Progress, ServiceBase
from tg_tinker.service.keywords import suggesting
from tg_tinker.types import arguments, checks
from tg_tinker.types.config import DPConfig
from tg_tinker.wire import loops

__all__ = ["Scope", "TrainerService", "one_replica", "scope_of"]

DEFAULT_RANK = 32
Scope = Literal["default", "team", "deployment"]
_SCOPES = ("default", "team", "deployment")


class TrainerService(ServiceBase):
    """The trainers' part of ``ServiceClient``."""

    @classmethod
    def local(
        cls,
        *,
        trainer_url: str | None = None,
        sampler_url: str | None = None,
        run_id: str | None = None,
        api_key: str | None = None,
        timeout: float = settings.TIMEOUT,
        retry_count: int = settings.RETRY_COUNT,
        ready_timeout: float = 600.0,
        verify_ssl: bool | None = None,
        home: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """A client of a running trainer and sampler at known addresses; nothing is asked before the first call.

        ``create_lora_training_client`` gives the trainer a fresh adapter, as the published client does; ``attach()``
        takes it up as it is. ``run_id`` names the run in checkpoint URIs: by default the id in a URL of ours
        (``http://host:port/loops/trainers/<run_id>``), or one that is drawn, for a published worker knows none.
        Checkpoints are listed by the server in front of the URL's ``/loops/``, or at its root.

        Raises ``InvalidRequestError`` where neither URL is given, or one is none.
        """
        found = LocalPlane.at(trainer_url, sampler_url, run_id)
        made = cls(
            base_url=found.server,
            api_key=api_key,
            timeout=timeout,
            retry_count=retry_count,
            ready_timeout=ready_timeout,
            verify_ssl=verify_ssl,
            home=home,
            progress=progress,
        )
        made._provider = found
        return made

    @cached_property
    def _provider(self) -> Provider:
        return ControlPlane()

    @blocking
    @suggesting
    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = DEFAULT_RANK,
        replicas: int = 1,
        seed: int | None = None,
        max_seq_len: int | None = None,
        timeout: float | None = None,
        ready_timeout: float | None = None,
        sampler_timeout: float | None = None,
        wandb_config: WandbConfig | None = None,
        with_sampler: bool = False,
        name: str | None = None,
        sampler_num_replicas: int | None = None,
        scope: Scope | None = None,
        *,
        dp_config: DPConfig | Mapping[str, Any] | None = None,
        tracker: Tracker | None = None,
    ) -> Flow[TrainingClient]:
        """Create a run of the Loops surface; blocks until its model is loaded, ``ready_timeout`` seconds at most.

        Every linear layer but the output head is adapted, with LoRA alpha 32. ``max_seq_len`` is in tokens; ``seed``
        None lets the server draw one. ``timeout`` and ``sampler_timeout`` bound the silence on one request of trainer
        and sampler, in seconds; None is the service's own. ``with_sampler`` opens the paired sampler at once, and lets
        ``save_state`` publish to it. ``wandb_config``, or a ``tracker`` of your own, is told of every optimizer step.

        Raises ``InvalidRequestError`` naming the field, ``ResourceNotFoundError`` for an unknown model,
        ``FutureTimeoutError`` where it takes too long.
        """
        limits = {"timeout": timeout, "ready_timeout": ready_timeout, "sampler_timeout": sampler_timeout}
        one_replica("sampler_num_replicas", 1 if sampler_num_replicas is None else sampler_num_replicas)
        request = loops.TrainerRequest(
            base_model=arguments.text("base_model", base_model),
            lora_rank=arguments.whole("rank", rank, 1, 512),
            replicas=one_replica("replicas", replicas),
            seed=None if seed is None else arguments.whole("seed", seed, 0, 2**63 - 1),
            max_seq_len=None if max_seq_len is None else arguments.whole("max_seq_len", max_seq_len, 1),
            name=arguments.optional_text("name", name),
            dp_config=_dp_fields(dp_config),
            with_sampler=arguments.flag("with_sampler", with_sampler) or None,
            scope=scope_of(scope),
        )
        steps = partial(self._create_tracked, request, Waits.given(self.config, **limits), wandb_config, tracker)
        return Flow(operation="create_lora_training_client", steps=steps)

    create_lora_training_client_async = twin(create_lora_training_client)

    async def _create_tracked(
        self, request: loops.TrainerRequest, waits: Waits, wandb_config: WandbConfig | None, tracker: Tracker | None
    ) -> TrainingClient:
        async with waits.creating(f"a trainer of {request.base_model}"):
            made = await self._create_trainer(request, waits)
        told = await asyncio.to_thread(tracker_of, wandb_config, tracker)  # last: W&B's run would outlive a failure
        if told is not None:
            made.track(told)
        return made

    async def _create_trainer(self, request: loops.TrainerRequest, waits: Waits) -> TrainingClient:
        model = request.base_model
        self._report("load", f"a trainer of {model}: the server loads the model, and fetches it first where it has to")
        run = await self._provider.create_trainer(self.core, request, waits.ready)
        made = self._trainer_of(run, request.lora_rank, request.max_seq_len, waits)
        if not plane.is_ours(run.base_url):  # a published trainer has no adapter before it is told to make one
            await hosted.wait_until_healthy(made.core, run, waits.ready)
            await made.core.start(made.init_call(request.lora_rank)).result_async(waits.ready)
        if request.with_sampler:
            await made.open_sampler()
        self._report("ready", f"run {run.id} on {model}")
        return made

    @blocking
    @suggesting
    def create_training_client_from_state(
        self, path: str, user_metadata: Mapping[str, Any] | None = None, replicas: int = 1
    ) -> Flow[TrainingClient]:
        """Create a run from a checkpoint's weights (``bt://loops:<run_id>/weights/<name>``), its optimizer fresh.

        ``user_metadata`` is taken for programs that give it and, as in Loops, kept nowhere.
        """
        _metadata(user_metadata)
        one_replica("replicas", replicas)
        steps = partial(self._from_state, plane.checkpoint_path(path), with_optimizer=False)
        return Flow(operation="create_training_client_from_state", steps=steps)

    create_training_client_from_state_async = twin(create_training_client_from_state)

    @blocking
    @suggesting
    def create_training_client_from_state_with_optimizer(
        self, path: str, user_metadata: Mapping[str, Any] | None = None, replicas: int = 1
    ) -> Flow[TrainingClient]:
        """Create a run that goes on where a checkpoint was saved, optimizer included; otherwise as the other one."""
        _metadata(user_metadata)
        one_replica("replicas", replicas)
        steps = partial(self._from_state, plane.checkpoint_path(path), with_optimizer=True)
        return Flow(operation="create_training_client_from_state_with_optimizer", steps=steps)

    create_training_client_from_state_with_optimizer_async = twin(create_training_client_from_state_with_optimizer)

    async def _from_state(self, path: str, *, with_optimizer: bool) -> TrainingClient:
        waits = Waits.given(self.config)
        async with waits.creating(f"a trainer from {path}"):
            found = await plane.checkpoint_at(self.core, path)
            rank = DEFAULT_RANK if found.lora_adapter_config is None else found.lora_adapter_config.rank
            request = loops.TrainerRequest(base_model=found.base_model, lora_rank=rank)
            made = await self._create_trainer(request, waits)
            await made.core.start(made.load_call(path, with_optimizer=with_optimizer))
        return made

    @blocking
    def attach(self, run_id: str | None = None) -> Flow[TrainingClient]:
        """Attach to a live trainer as it is; nothing is reset. Raises ``ResourceNotFoundError`` where there is none.

        ``run_id`` may be left out where ``local`` named the trainer.
        """
        if run_id is not None or not isinstance(self._provider, LocalPlane):
            arguments.text("run_id", run_id)
        return Flow(operation="attach", steps=partial(self._attach, run_id))

    attach_async = twin(attach)

    async def _attach(self, run_id: str | None) -> TrainingClient:
        run = await self._provider.find_trainer(self.core, run_id)
        return self._trainer_of(run, None, run.max_seq_len, Waits.given(self.config))

    @blocking
    def deactivate_run(self, run_id: str) -> Call[None]:
        """End a run of the Loops surface for good: its adapter, queue and sampler go, its checkpoints stay.

        Raises ``ResourceNotFoundError`` where there is no such run.
        """
        parts = {"id": arguments.text("run_id", run_id)}
        return call(loops.DEACTIVATE_RUN, parts=parts, decode=_nothing, whole_reply=True)

    deactivate_run_async = twin(deactivate_run)

    def _trainer_of(self, run: loops.Run, rank: int | None, max_seq_len: int | None, waits: Waits) -> TrainingClient:
        made = TrainingClient(
            self.core.service,
            run,
            self._tokenizers,
            self._provider,
            waits=waits,
            lora_rank=run.lora_rank or rank,
            max_seq_len=max_seq_len,
        )
        if not plane.is_ours(run.base_url):
            hosted.keep_awake(made.core, run)
        return made


def one_replica(field: str, value: object) -> int:
    """The only number of replicas there is."""
    if value != 1 or isinstance(value, bool):
        raise checks.refuse(field, "1: this client works with one process", value)
    return 1


def scope_of(value: object) -> Scope | None:
    """Where a published control plane is to run it; our server has one place for all."""
    if value is None or value in _SCOPES:
        return value  # type: ignore[return-value]
    why = ": a serverless run speaks another protocol" if value == "serverless" else ""
    raise checks.refuse("scope", f"one of {', '.join(_SCOPES)}, or None{why}", value)


def _metadata(value: object) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise checks.refuse("user_metadata", "a dict, or None", value)


def _nothing(_: object) -> None:
    """What is told of a run that has ended."""


def _dp_fields(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    config = value if isinstance(value, DPConfig) else None
    if config is None:
        if not isinstance(value, Mapping):
            raise checks.refuse("dp_config", "a DPConfig or a dict of its fields", value)
        config = checks.build(DPConfig, value, at="dp_config")
    return attrs.asdict(config)
