"""Making runs, and ending them: models are loaded, trainers made on the device thread, ids and seeds drawn."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError, ServerError, TGTinkerError
from tg_tinker.server.records.ticket_book import key_reused
from tg_tinker.server.records.tickets import Ticket, outcome_of
from tg_tinker.server.training import loops_operations, tg_operations
from tg_tinker.server.training.private import PrivateTraining
from tg_tinker.server.training.runs import Run, Surface
from tg_tinker.server.weights.models import Model
from tg_tinker.server.weights.versions import Versions
from tg_tinker.types import checks
from tg_tinker.types.config import DPConfig, TrainingConfig
from tg_tinker.wire import codec, loops
from tg_tinker.wire.checkpoint_uri import CheckpointUri

if TYPE_CHECKING:
    from tg_tinker.engine.training.trainer import Trainer
    from tg_tinker.server.rooms import Rooms

LOOPS_ALPHA = 32.0  # Loops fixes alpha, and adapts every linear layer
KEPT_KEYS = 1000


class Creation:
    """Makes what the handlers then work with."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._made: dict[tuple[str, str], tuple[object, asyncio.Task[Run]]] = {}  # what was asked for, and its making

    async def tg_run(self, tenant: str, config: TrainingConfig, checkpoint_id: str | None, key: str | None) -> Run:
        """A run of the TG surface, from a saved state if one is named; a retried request gets the same run."""
        return await self._once(
            tenant, key, (config, checkpoint_id), lambda: self._tg_run(tenant, config, checkpoint_id)
        )

    async def loops_run(self, tenant: str, request: loops.TrainerRequest, key: str | None) -> Run:
        """A run of the Loops surface, likewise."""
        return await self._once(tenant, key, request, lambda: self._loops_run(tenant, request))

    async def end(self, run: Run) -> None:
        """Delete a run; whatever it still had to do is cancelled, its artifacts stay."""
        await self._forget(run)
        await self._rooms.auditing.happened(
            run.tenant, "delete_training_client", f"{run.id}/delete", training_client_id=run.id
        )

    async def _forget(self, run: Run) -> None:
        self._rooms.runs.remove(run)
        self._rooms.samplers.forget(run)
        self._made = {key: made for key, made in self._made.items() if not _made_it(made[1], run)}
        await self._rooms.registry.delete(run)
        for ticket in self._rooms.tickets.of_tenant(run.tenant):
            if ticket.run_id == run.id and not ticket.done:
                await self._rooms.tickets.cancel(ticket)
        await asyncio.to_thread(self._rooms.store.clear_aside, run.tenant, run.id)

    async def _once(
        self, tenant: str, key: str | None, asked: object, make: Callable[[], Coroutine[Any, Any, Run]]
    ) -> Run:
        """Make it in a task of its own: the request may go away, a retry of it then waits for the same task."""
        known, task = self._made.get((tenant, key), (asked, None)) if key is not None else (asked, None)
        if known != asked:
            raise key_reused()
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._recorded(tenant, make), name="create a run")
            if key is not None:
                self._made[tenant, key] = asked, task
                while len(self._made) > KEPT_KEYS:
                    del self._made[next(iter(self._made))]
        return await asyncio.shield(task)

    async def _recorded(self, tenant: str, make: Callable[[], Coroutine[Any, Any, Run]]) -> Run:
        """Make it, and put on record whether that went well."""
        operation, happened = "create_training_client", self._rooms.auditing.happened
        try:
            run = await make()
        # Whatever keeps a run from being made belongs into the log; what it is goes on to whoever asked.
        except Exception as error:
            failure = error if isinstance(error, TGTinkerError) else ServerError("the server failed; its log says why")
            await happened(tenant, operation, f"create-{uuid.uuid4()}", failure)
            raise
        await happened(tenant, operation, run.id, training_client_id=run.id)
        return run

    async def _tg_run(self, tenant: str, config: TrainingConfig, checkpoint_id: str | None) -> Run:
        if config.lora_config.bias != "none":
            raise checks.refuse("lora_config.bias", "'none': biases are not trained", config.lora_config.bias)
        rooms = self._rooms
        config = config if config.seed is not None else attrs.evolve(config, seed=secrets.randbits(63))
        model = await self._tg_model(config)
        fields = codec.loads(codec.dumps(config))
        rooms.engine.optimizer(**tg_operations.optimizer_fields(fields, config.max_steps))
        run_id = f"tc-{uuid.uuid4()}"
        size = config.batch_size * config.gradient_accumulation_steps
        privacy = await self._privacy(run_id, config.dp_config, size, "one row of a batch")
        trainer = await self._tg_trainer(model, config)
        run = await self._add(
            run_id=run_id, tenant=tenant, surface="tg", model=model, trainer=trainer, config=fields,
            max_steps=config.max_steps, privacy=privacy,
        )  # fmt: skip
        if checkpoint_id is not None:
            await self._load(run, lambda t: tg_operations.load_state(run, rooms.engine, rooms.store, t, checkpoint_id))
        return run

    async def _loops_run(self, tenant: str, request: loops.TrainerRequest) -> Run:
        rooms = self._rooms
        dp_config = None if request.dp_config is None else checks.build(DPConfig, request.dp_config, at="dp_config")
        uri = None if request.path is None else CheckpointUri.parse(request.path)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        model = await rooms.models.get(request.base_model)
        max_length = min(request.max_seq_len or model.base.max_length, model.base.max_length)
        config = {
            "base_model": request.base_model,
            "session_id": request.session_id,
            "name": request.name,
            "lora_rank": request.lora_rank,
            "seed": seed,
            "max_seq_len": max_length,
            "with_sampler": bool(request.with_sampler),
        }
        run_id = f"run-{uuid.uuid4().hex}"
        privacy = await self._privacy(run_id, dp_config, None, "one datum")
        trainer = await self._trainer(model, loops_spec(config), loops_options(config))
        run = await self._add(
            run_id=run_id, tenant=tenant, surface="loops", model=model, trainer=trainer, config=config, privacy=privacy
        )
        if uri is not None:
            await self._load(
                run, lambda t: loops_operations.load_state(run, rooms.engine, rooms.store, t, uri, with_optimizer=True)
            )
        return run

    async def _tg_model(self, config: TrainingConfig) -> Model:
        try:
            return await self._rooms.models.get(config.model_ref, config.mixed_precision)
        except InvalidRequestError as error:
            if error.field != "dtype":
                raise
            wanted = "auto, fp32, bf16, or fp16 on a GPU"
            raise checks.refuse("mixed_precision", wanted, config.mixed_precision) from error

    async def _tg_trainer(self, model: Model, config: TrainingConfig) -> Trainer:
        spec = tg_spec(config)
        try:
            return await self._trainer(model, spec, tg_options(config, model.base.max_length))
        except InvalidRequestError as error:
            if error.field not in spec:
                raise
            raise checks.located(error, "lora_config") from error

    async def _trainer(self, model: Model, spec: Mapping[str, Any], options: Mapping[str, Any]) -> Trainer:
        return await self._rooms.scheduler.call(lambda: self._rooms.engine.trainer(model.base, spec, **options))

    async def _privacy(
        self, run_id: str, config: DPConfig | None, batch_size: int | None, unit: str
    ) -> PrivateTraining | None:
        if config is None or not config.enabled:
            return None
        home = self._rooms.settings.home
        return await asyncio.to_thread(
            PrivateTraining.open, config, run_id=run_id, home=home, default_batch_size=batch_size, unit=unit
        )

    async def _add(self, *, run_id: str, tenant: str, surface: Surface, config: dict[str, Any], **parts: Any) -> Run:
        rooms, settings = self._rooms, self._rooms.settings
        versions = Versions(settings.versions_kept, settings.aside_bytes)
        run = Run(run_id=run_id, tenant=tenant, surface=surface, config=config, versions=versions, **parts)
        await rooms.registry.record(run)
        rooms.runs.add(run)
        return run

    async def _load(self, run: Run, begin: Callable[[Ticket], Any]) -> None:
        """Load a state into a run that nobody has seen yet; without it there is no run."""
        ticket = Ticket(tenant=run.tenant, run_id=run.id, operation="load_state", key=None, digest="", request_id=None)
        tickets = self._rooms.tickets
        try:
            tickets.accept(ticket, run.lane, partial(begin, ticket))
            await ticket.wait(None)
            await outcome_of(ticket)
        except BaseException:  # a failure, or a client that went away: nobody will ever know the run's id
            await self._forget(run)
            raise


def tg_spec(config: TrainingConfig) -> dict[str, Any]:
    """The adapter of a TG run, whose seed is drawn by now."""
    fields = ("rank", "alpha", "dropout", "target_modules", "modules_to_save")
    return {**{name: getattr(config.lora_config, name) for name in fields}, "seed": config.seed}


def tg_options(config: TrainingConfig, max_length: int) -> dict[str, Any]:
    """The other arguments of a TG run's trainer; ``max_length`` is the model's, in tokens."""
    return {
        "reduction": "label_mean",
        "seed": config.seed,
        "gradient_checkpointing": config.gradient_checkpointing,
        "max_length": min(config.max_sequence_length, max_length),
    }


def loops_spec(config: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter of a Loops run."""
    return {"rank": config["lora_rank"], "alpha": LOOPS_ALPHA, "target_modules": None, "seed": config["seed"]}


def loops_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The other arguments of a Loops run's trainer."""
    return {"reduction": "token_mean", "seed": config["seed"], "max_length": config["max_seq_len"]}


def _made_it(task: asyncio.Task[Run], run: Run) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None and task.result() is run
