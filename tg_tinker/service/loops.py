"""What a ``ServiceClient`` offers of the Loops surface: trainers, samplers, checkpoints, capabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import attrs

from tg_tinker.core.call import Call, Flow, call
from tg_tinker.faces import blocking, twin
from tg_tinker.loops import plane
from tg_tinker.loops.tracking import Tracker, WandbConfig, tracker_of
from tg_tinker.loops.training import TrainingClient
from tg_tinker.sampling import SamplingClient
from tg_tinker.service.base import ServiceBase
from tg_tinker.types import arguments, checks
from tg_tinker.types.config import DPConfig
from tg_tinker.types.loops_results import Checkpoint, CheckpointFilesResponse, ServerCapabilities
from tg_tinker.wire import loops

__all__ = ["LoopsService"]

DEFAULT_RANK = 32
_TARGETS = ("trainer", "sampler")


class LoopsService(ServiceBase):
    """The Loops half of ``ServiceClient``."""

    _session: str | None = None

    # -------------------------------------------------------------------------------------------- trainers

    @blocking
    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = DEFAULT_RANK,
        replicas: int = 1,
        seed: int | None = None,
        max_seq_len: int | None = None,
        *,
        name: str | None = None,
        dp_config: DPConfig | Mapping[str, Any] | None = None,
        wandb_config: WandbConfig | None = None,
        tracker: Tracker | None = None,
    ) -> Flow[TrainingClient]:
        """Create a run of the Loops surface; blocks until its model is loaded, ``ready_timeout`` seconds at most.

        ``wandb_config`` (or a ``tracker`` of your own) is told loss, learning rate, gradient norm, tokens/s and epsilon
        of every optimizer step.

        Every linear layer but the output head is adapted, with LoRA alpha 32. ``max_seq_len`` is in tokens; ``seed``
        None lets the server draw one.

        Raises ``InvalidRequestError`` naming the field, ``ResourceNotFoundError`` for an unknown model.
        """
        request = loops.TrainerRequest(
            base_model=arguments.text("base_model", base_model),
            lora_rank=arguments.whole("rank", rank, 1, 512),
            replicas=_one("replicas", replicas),
            seed=None if seed is None else arguments.whole("seed", seed, 0, 2**63 - 1),
            max_seq_len=None if max_seq_len is None else arguments.whole("max_seq_len", max_seq_len, 1),
            name=arguments.optional_text("name", name),
            dp_config=_dp_fields(dp_config),
        )
        steps = partial(self._create_tracked, request, wandb_config, tracker)
        return Flow(operation="create_lora_training_client", steps=steps)

    create_lora_training_client_async = twin(create_lora_training_client)

    async def _create_tracked(
        self, request: loops.TrainerRequest, wandb_config: WandbConfig | None, tracker: Tracker | None
    ) -> TrainingClient:
        made = await self._create_trainer(request)
        told = await asyncio.to_thread(tracker_of, wandb_config, tracker)  # last: W&B's run would outlive a failure
        if told is not None:
            made.track(told)
        return made

    async def _create_trainer(self, request: loops.TrainerRequest) -> TrainingClient:
        if self._session is None:
            self._session = (await self.core.perform(call(loops.CREATE_SESSION, {}))).session.id
        model, asked = request.base_model, attrs.evolve(request, session_id=self._session)
        self._report("load", f"a trainer of {model}: the server loads the model, and fetches it first where it has to")
        create = call(loops.CREATE_TRAINER, plane.fields(asked), timeout=self.config.ready_timeout)
        run = (await self.core.perform(create)).run
        made = self._trainer_of(run, request.lora_rank, request.max_seq_len)
        if not plane.is_ours(run.base_url):  # a published trainer has no adapter before it is told to make one
            await plane.wait_until_healthy(made.core, run, self.config.ready_timeout)
            await made.core.start(made.init_call(request.lora_rank)).result_async(self.config.ready_timeout)
        self._report("ready", f"run {run.id} on {model}")
        return made

    @blocking
    def create_training_client_from_state(self, path: str) -> Flow[TrainingClient]:
        """Create a run from a checkpoint's weights (``bt://loops:<run_id>/weights/<name>``), its optimizer fresh."""
        checked = plane.checkpoint_path(path)
        steps = partial(self._from_state, checked, with_optimizer=False)
        return Flow(operation="create_training_client_from_state", steps=steps)

    create_training_client_from_state_async = twin(create_training_client_from_state)

    @blocking
    def create_training_client_from_state_with_optimizer(self, path: str) -> Flow[TrainingClient]:
        """Create a run that goes on where a checkpoint was saved, optimizer included."""
        checked = plane.checkpoint_path(path)
        steps = partial(self._from_state, checked, with_optimizer=True)
        return Flow(operation="create_training_client_from_state_with_optimizer", steps=steps)

    create_training_client_from_state_with_optimizer_async = twin(create_training_client_from_state_with_optimizer)

    async def _from_state(self, path: str, *, with_optimizer: bool) -> TrainingClient:
        found = await plane.checkpoint_at(self.core, path)
        rank = DEFAULT_RANK if found.lora_adapter_config is None else found.lora_adapter_config.rank
        made = await self._create_trainer(loops.TrainerRequest(base_model=found.base_model, lora_rank=rank))
        loading = made.core.start(made.load_call(path, with_optimizer=with_optimizer))
        await loading.result_async(self.config.ready_timeout)
        return made

    @blocking
    def attach(self, run_id: str) -> Flow[TrainingClient]:
        """Attach to a live trainer as it is; nothing is reset. Raises ``ResourceNotFoundError`` where there is none."""
        return Flow(operation="attach", steps=partial(self._attach, arguments.text("run_id", run_id)))

    attach_async = twin(attach)

    async def _attach(self, run_id: str) -> TrainingClient:
        run = (await self.core.perform(call(loops.GET_RUN, parts={"id": run_id}))).run
        return self._trainer_of(run, run.lora_rank or DEFAULT_RANK, run.max_seq_len)

    def _trainer_of(self, run: loops.Run, rank: int, max_seq_len: int | None) -> TrainingClient:
        return TrainingClient(
            self.core.service,
            run,
            self._tokenizers,
            timeout=self.config.timeout,
            lora_rank=run.lora_rank or rank,
            max_seq_len=max_seq_len,
        )

    # -------------------------------------------------------------------------------------------- samplers

    @blocking
    def create_sampling_client(
        self, base_model: str | None = None, *, model_path: str | None = None, max_seq_len: int | None = None
    ) -> Flow[SamplingClient]:
        """Return a sampler of a base model alone, or of a ``bt://loops:<run_id>/sampler_weights/<name>`` checkpoint.

        Raises ``InvalidRequestError`` unless exactly one of ``base_model`` and ``model_path`` is given,
        ``ResourceNotFoundError`` where there is no such model or checkpoint.
        """
        if (base_model is None) == (model_path is None):
            raise checks.refuse("base_model", "exactly one of base_model and model_path", base_model)
        request = loops.SamplerRequest(
            base_model=arguments.optional_text("base_model", base_model),
            model_path=None if model_path is None else plane.checkpoint_path(model_path, "model_path"),
            max_seq_length=None if max_seq_len is None else arguments.whole("max_seq_len", max_seq_len, 1),
        )
        return Flow(operation="create_sampling_client", steps=partial(self._open_sampler, request))

    create_sampling_client_async = twin(create_sampling_client)

    async def _open_sampler(self, request: loops.SamplerRequest) -> SamplingClient:
        self._report("load", f"a sampler of {request.base_model or request.model_path}")
        given = self.config
        sampler = await plane.open_sampler(self.core, request, given.ready_timeout)
        pinned = plane.pinned_to(request.model_path)
        made = SamplingClient(
            self.core.service,
            sampler,
            self._tokenizers,
            timeout=given.timeout,
            ready_timeout=given.ready_timeout,
            pinned=pinned,
        )
        self._report("ready", f"sampler {sampler.id} of {sampler.base_model}")
        return made

    # ----------------------------------------------------------------------------------------- checkpoints

    @blocking
    def list_checkpoints(self, run_id: str) -> Flow[list[Checkpoint]]:
        """List a run's checkpoints."""
        steps = partial(self._checkpoints, arguments.text("run_id", run_id))
        return Flow(operation="list_checkpoints", steps=steps)

    list_checkpoints_async = twin(list_checkpoints)

    async def _checkpoints(self, run_id: str) -> list[Checkpoint]:
        return await plane.checkpoints_of(self.core, run_id)

    @blocking
    def get_checkpoint_archive_url(
        self,
        checkpoint_id: str | None = None,
        name: str | None = None,
        run_id: str | None = None,
        target: Literal["trainer", "sampler"] | None = None,
        page_size: int = 1000,
        page_token: int = 0,
    ) -> Flow[CheckpointFilesResponse]:
        """Return signed URLs of a checkpoint's files, page by page; it goes by its id, or by run and name.

        ``target`` tells a trainer's and a sampler's checkpoint of the same name apart.
        """
        if (checkpoint_id is None) == (name is None):
            raise checks.refuse("checkpoint_id", "exactly one of checkpoint_id and name", checkpoint_id)
        if name is not None and run_id is None:
            raise checks.refuse("run_id", "a run beside the name", None)
        if target is not None and target not in _TARGETS:
            raise checks.refuse("target", "'trainer', 'sampler' or None", target)
        page = {
            "page_size": arguments.whole("page_size", page_size, 1, 1000),
            "page_token": arguments.whole("page_token", page_token, 0),
        }
        wanted = arguments.text("checkpoint_id", checkpoint_id) if name is None else arguments.text("name", name)
        return Flow(
            operation="get_checkpoint_archive_url",
            steps=partial(self._archive_page, wanted, page, run_id, target),
        )

    get_checkpoint_archive_url_async = twin(get_checkpoint_archive_url)

    async def _archive_page(
        self, wanted: str, page: Mapping[str, int], run_id: str | None, target: str | None
    ) -> CheckpointFilesResponse:
        return await plane.archive_page(self.core, wanted, page, run_id=run_id, target=target)

    @blocking
    def get_server_capabilities(self) -> Call[ServerCapabilities]:
        """Say what the server offers: models at hand, losses, wire extensions."""
        return call(loops.CAPABILITIES)

    get_server_capabilities_async = twin(get_server_capabilities)


def _one(field: str, value: object) -> int:
    if value != 1 or isinstance(value, bool):
        raise checks.refuse(field, "1: this client works with one trainer process", value)
    return 1


def _dp_fields(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    config = value if isinstance(value, DPConfig) else None
    if config is None:
        if not isinstance(value, Mapping):
            raise checks.refuse("dp_config", "a DPConfig or a dict of its fields", value)
        config = checks.build(DPConfig, value, at="dp_config")
    return attrs.asdict(config)
