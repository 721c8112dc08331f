"""The operations of the Loops surface, as the scheduler runs them: generators on the device thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.server.engine import Engine
from tg_tinker.server.records.tickets import Ticket
from tg_tinker.server.training import states
from tg_tinker.server.training.runs import Run
from tg_tinker.server.weights.versions import Version
from tg_tinker.server.work.operations import Offline, Steps
from tg_tinker.server.work.scheduler import tell
from tg_tinker.types import loops_results as results
from tg_tinker.types.results import DPMetrics
from tg_tinker.types.tensor import TensorData
from tg_tinker.wire import loops
from tg_tinker.wire.checkpoint_uri import SAMPLER_WEIGHTS, WEIGHTS, CheckpointUri

if TYPE_CHECKING:
    from tg_tinker.engine.training.trainer import PassOutput
    from tg_tinker.store.checkpoints import ArtifactRecord, CheckpointStore


def forward(run: Run, engine: Engine, request: loops.PassRequest) -> Steps[results.ForwardBackwardOutput]:
    """Loss and logprobs, gradients untouched."""
    rows = engine.rows(request.data)
    output = yield from run.trainer.forward(rows, request.loss_fn, request.loss_fn_config)
    return _pass_output(output)


def forward_backward(
    run: Run, engine: Engine, ticket: Ticket, request: loops.PassRequest
) -> Steps[results.ForwardBackwardOutput]:
    """A pass that adds gradients."""
    output = yield from run.train(ticket, lambda: engine.rows(request.data), request.loss_fn, request.loss_fn_config)
    return _pass_output(output)


def optim_step(
    run: Run, engine: Engine, ticket: Ticket, request: loops.OptimStepRequest
) -> Steps[results.OptimStepResponse]:
    """One step of AdamW with the request's own settings."""
    run.check_trainable()
    run.check_gradients(ticket)
    yield from run.account()
    adam = request.adam_params
    optimizer = engine.optimizer(
        name="adamw",
        learning_rate=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        grad_clip_norm=adam.grad_clip_norm,
    )
    output, private = run.step_with(optimizer)
    rate = output.learning_rate
    metrics = {"step": float(output.step), "learning_rate": rate, "lr": rate, "grad_norm": output.grad_norm}
    if private is not None:
        ticket.dp_metrics = private.to_dict()
        metrics |= _private_metrics(private)
    return results.OptimStepResponse(metrics=metrics)


def save_state(
    run: Run, store: CheckpointStore, ticket: Ticket, loop: asyncio.AbstractEventLoop, request: loops.SaveStateRequest
) -> Steps[results.SaveWeightsResponse]:
    """A named checkpoint of weights and optimizer; a run that was made with its sampler publishes them as well."""
    yield from ()
    uri = CheckpointUri(run.id, WEIGHTS, request.name)
    saving = states.save(
        run, store, kind=WEIGHTS, metadata=_described(run), name=request.name, expires_at=_expiry(request.ttl_seconds)
    )
    publishing = _publish(run, store, ticket, loop, request) if run.config.get("with_sampler") else None

    def write() -> results.SaveWeightsResponse:
        if publishing is not None:  # first: its version is served already, and is durable or taken back by this
            publishing.work()
        record = saving.work()
        ticket.produced.append(record.artifact_id)
        ticket.consumed += _move_name(run, store, record)
        return results.SaveWeightsResponse(mode="local", path=str(uri))

    return Offline(write)


def publish(
    run: Run,
    store: CheckpointStore,
    ticket: Ticket,
    loop: asyncio.AbstractEventLoop,
    request: loops.SaveWeightsForSamplerRequest,
) -> Steps[results.SaveWeightsForSamplerResponse]:
    """Freeze the adapter as a new version: served at once, and durable under its name when the ticket ends."""
    yield from ()
    return _publish(run, store, ticket, loop, request, bumped=request.bump_version)


def _publish(
    run: Run,
    store: CheckpointStore,
    ticket: Ticket,
    loop: asyncio.AbstractEventLoop,
    request: loops.SaveWeightsForSamplerRequest | loops.SaveStateRequest,
    *,
    bumped: bool = False,
) -> Offline[results.SaveWeightsForSamplerResponse]:
    run.published += 1
    version = Version(run.published, request.name, run.snapshot(), bumped)
    tell(loop, run.versions.add, version)
    uri = CheckpointUri(run.id, SAMPLER_WEIGHTS, request.name)
    step, metadata = run.step, {**_described(run), "version": version.number}
    counters = {"spec": attrs.asdict(version.adapter.spec), states.KEY: states.origin(run)}
    privacy = states.privacy_of(run)

    def write() -> results.SaveWeightsForSamplerResponse:
        try:
            record = store.save(
                tenant=run.tenant,
                run_id=run.id,
                kind=SAMPLER_WEIGHTS,
                step=step,
                tensors=version.adapter.named(),
                counters=counters,
                metadata=metadata,
                name=request.name,
                expires_at=_expiry(request.ttl_seconds),
                privacy=privacy,
            )
        except BaseException:  # whatever it was: a version that is nowhere on disk must not go on being served
            tell(loop, run.versions.withdraw, version.number)
            raise
        ticket.produced.append(record.artifact_id)
        run.versions.shelf.add(version.number, record)
        ticket.consumed += _move_name(run, store, record, version.number)
        return results.SaveWeightsForSamplerResponse(version=version.number, path=str(uri), mode="local")

    return Offline(write)


def load_state(
    run: Run, engine: Engine, store: CheckpointStore, ticket: Ticket, uri: CheckpointUri, *, with_optimizer: bool
) -> Steps[results.LoadWeightsResponse]:
    """Restore a named checkpoint at this place in the order."""

    def find() -> Any:
        record = store.find(run.tenant, uri.run_id, uri.kind, uri.name)
        ticket.consumed.append(record.artifact_id)
        return store.load(run.tenant, record.artifact_id)

    restored = yield from states.load(run, engine, find, with_optimizer=with_optimizer)
    return results.LoadWeightsResponse(step=restored.step)


def init_trainer_server(
    run: Run, make_trainer: Callable[[int], Any], request: loops.InitTrainerServerRequest
) -> Steps[results.InitTrainerServerResponse]:
    """A fresh adapter of the given rank at step 0; published versions stay and go on counting."""
    yield from ()
    run.use(make_trainer(request.lora_rank))
    run.config = {**run.config, "lora_rank": request.lora_rank}
    run.start_afresh()
    return results.InitTrainerServerResponse(lora_rank=request.lora_rank, step=run.step)


def _pass_output(output: PassOutput) -> results.ForwardBackwardOutput:
    return results.ForwardBackwardOutput(
        loss=output.loss,
        loss_fn_outputs=tuple({"logprobs": TensorData(values, "float32")} for values in output.logprobs),
        metrics={"loss": output.loss, **output.metrics},
    )


def _private_metrics(private: DPMetrics) -> dict[str, float]:
    """Numbers alone: an infinite ε is left out, and is a flag of 1.0."""
    numbers: dict[str, float | None] = {
        "epsilon": private.total_epsilon,
        "epsilon_spent": private.epsilon_spent,
        "delta": private.delta,
        "num_clipped": float(private.num_clipped),
        "epsilon_is_infinite": 1.0 if private.epsilon_is_infinite else None,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def _described(run: Run) -> dict[str, Any]:
    """What listings say of a checkpoint without opening it."""
    return {"base_model": run.model.ref, "lora_rank": run.trainer.adapter.spec.rank}


def _expiry(ttl_seconds: int | None) -> datetime | None:
    return None if ttl_seconds is None else datetime.now(UTC) + timedelta(seconds=ttl_seconds)


def _move_name(run: Run, store: CheckpointStore, record: ArtifactRecord, version: int = 0) -> list[str]:
    """The name is ``record``'s now: delete what had it before, unless that has a time to live of its own.

    A published version is put aside instead, for whoever is pinned to it. Gives the ids of what was deleted.
    """
    key = (record.kind, str(record.name))
    older = run.named.get(key)
    run.named[key] = record.artifact_id, version
    if older is None:
        return []
    with contextlib.suppress(ResourceNotFoundError):  # it was deleted, or has expired
        if store.get(run.tenant, older[0]).expires_at is not None:
            return []
        if version:
            return _put_aside(run, store, *older)
        store.delete(run.tenant, older[0])
        return [older[0]]
    return []


def _put_aside(run: Run, store: CheckpointStore, artifact_id: str, version: int) -> list[str]:
    store.put_aside(run.tenant, artifact_id)
    deleted = []
    for gone in run.versions.shelf.put_aside(version):
        with contextlib.suppress(ResourceNotFoundError):
            store.delete(run.tenant, gone.artifact_id)
            deleted.append(gone.artifact_id)
    return deleted
