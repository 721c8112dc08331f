"""The Loops data plane of a trainer: submit with 202, retrieve from ``/operations/{id}``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web

from tg_tinker.errors import ResourceNotFoundError, TGTinkerError
from tg_tinker.server import creation
from tg_tinker.server.api import common
from tg_tinker.server.records.tickets import Held, Ticket
from tg_tinker.server.training import loops_operations
from tg_tinker.server.training.runs import Run
from tg_tinker.types import checks, losses
from tg_tinker.types.loops import datums
from tg_tinker.wire import codec, loops
from tg_tinker.wire.checkpoint_uri import CheckpointUri

T = TypeVar("T")

BASE = "/loops/trainers/{run}"


def routes() -> list[web.RouteDef]:
    """Every route of this file."""
    return [
        web.post(BASE + loops.INIT_TRAINER_SERVER.path, init_trainer_server),
        web.post(BASE + loops.FORWARD.path, forward),
        web.post(BASE + loops.FORWARD_BACKWARD.path, forward_backward),
        web.post(BASE + loops.OPTIM_STEP.path, optim_step),
        web.post(BASE + loops.SAVE_STATE.path, save_state),
        web.post(BASE + loops.SAVE_WEIGHTS_FOR_SAMPLER.path, save_weights_for_sampler),
        web.post(BASE + loops.LOAD_STATE.path, load_state),
        web.post(BASE + loops.LOAD_STATE_WITH_OPTIMIZER.path, load_state_with_optimizer),
        web.get(BASE + loops.OPERATION.path, operation),
        web.post(BASE + loops.OPERATION_CANCEL.path, cancel),
        web.get(BASE + loops.POLICY_VERSION.path, policy_version),
        web.get(BASE + loops.HEALTH.path, health),
    ]


async def init_trainer_server(request: web.Request) -> web.Response:
    """Reset the trainer to a fresh adapter."""
    run, engine = await _run(request), common.rooms_of(request).engine
    body = await common.read(request, loops.InitTrainerServerRequest)

    def make(rank: int) -> Any:
        config = {**run.config, "lora_rank": rank}
        return engine.trainer(run.model.base, creation.loops_spec(config), **creation.loops_options(config))

    return await _submit(
        request, run, "init_trainer_server", lambda _: loops_operations.init_trainer_server(run, make, body)
    )


async def forward(request: web.Request) -> web.Response:
    """Accept a pass without gradients."""
    run, engine = await _run(request), common.rooms_of(request).engine
    body = await _read_pass(request, run)
    return await _submit(request, run, "forward", lambda _: loops_operations.forward(run, engine, body))


async def forward_backward(request: web.Request) -> web.Response:
    """Accept a pass with gradients."""
    run, engine = await _run(request), common.rooms_of(request).engine
    body = await _read_pass(request, run)
    ticket = await common.submit(
        request, run, "forward_backward", lambda t: loops_operations.forward_backward(run, engine, t, body)
    )
    run.passes.accepted(ticket)
    return _accepted(run, ticket)


async def optim_step(request: web.Request) -> web.Response:
    """Accept an optimizer step."""
    run, engine = await _run(request), common.rooms_of(request).engine
    body = await common.read(request, loops.OptimStepRequest)
    return await _submit(request, run, "optim_step", lambda t: loops_operations.optim_step(run, engine, t, body))


async def save_state(request: web.Request) -> web.Response:
    """Accept a named checkpoint."""
    run, rooms = await _run(request), common.rooms_of(request)
    body = await common.read(request, loops.SaveStateRequest)
    common.check_name(body.name, body.ttl_seconds)
    loop = rooms.tickets.loop
    return await _submit(
        request, run, "save_state", lambda t: loops_operations.save_state(run, rooms.store, t, loop, body)
    )


async def save_weights_for_sampler(request: web.Request) -> web.Response:
    """Accept a publish."""
    run, rooms = await _run(request), common.rooms_of(request)
    body = await common.read(request, loops.SaveWeightsForSamplerRequest)
    common.check_name(body.name, body.ttl_seconds)
    loop = rooms.tickets.loop
    return await _submit(
        request, run, "save_weights_for_sampler", lambda t: loops_operations.publish(run, rooms.store, t, loop, body)
    )


async def load_state(request: web.Request) -> web.Response:
    """Accept the loading of a checkpoint's weights."""
    return await _load(request, "load_state", with_optimizer=False)


async def load_state_with_optimizer(request: web.Request) -> web.Response:
    """Accept the loading of a checkpoint whole."""
    return await _load(request, "load_state_with_optimizer", with_optimizer=True)


async def operation(request: web.Request) -> web.Response:
    """The outcome; held until it is there, then 408 for "ask again"."""
    held, name = await _held(request), request.match_info["id"]
    if not await common.ended(request, held, common.seconds_to_hold(request)):
        return common.reply({"status": held.info().status, "operation_id": name}, loops.PENDING)
    error = held.error()
    if error is None:
        return common.reply({"status": "done", "operation_id": name, "result": codec.embedded(await held.body())})
    held.tell_failure()
    return common.reply(_failed(name, error))


async def cancel(request: web.Request) -> web.Response:
    """200 if it was kept from completing, 409 if it was too late."""
    held = await _held(request)
    cancelled = isinstance(held, Ticket) and await common.rooms_of(request).tickets.cancel(held)
    await common.ended(request, held, 0)
    answer = {"operation_id": request.match_info["id"], "status": held.info().status}
    return common.reply(answer, 200 if cancelled else 409)


async def policy_version(request: web.Request) -> web.Response:
    """Optimizer steps applied."""
    return common.reply(loops.PolicyVersion(policy_version=(await _run(request)).step))


async def health(request: web.Request) -> web.Response:
    """The trainer is there."""
    return common.reply({"status": "ok", "base_model": (await _run(request)).model.ref})


async def _load(request: web.Request, name: str, *, with_optimizer: bool) -> web.Response:
    run, rooms = await _run(request), common.rooms_of(request)
    uri = CheckpointUri.parse((await common.read(request, loops.LoadStateRequest)).path)
    return await _submit(
        request, run, name,
        lambda t: loops_operations.load_state(run, rooms.engine, rooms.store, t, uri, with_optimizer=with_optimizer),
    )  # fmt: skip


async def _read_pass(request: web.Request, run: Run) -> loops.PassRequest:
    body = await common.read(request, loops.PassRequest)
    if body.top_k_logprobs:
        raise checks.refuse("top_k_logprobs", "0: passes give the logprobs of the targets alone", body.top_k_logprobs)
    datums(body.data)
    losses.settings(body.loss_fn, body.loss_fn_config)
    losses.require_inputs(body.loss_fn, body.data)
    if run.privacy is None:  # with it, a refusal would tell what the examples are like
        losses.require_targets(body.data)
    return body


async def _submit(request: web.Request, run: Run, name: str, begin: Callable[[Ticket], Any]) -> web.Response:
    return _accepted(run, await common.submit(request, run, name, begin))


def _accepted(run: Run, ticket: Ticket) -> web.Response:
    location = f"{BASE.format(run=run.id)}/operations/{_id(ticket)}"
    return common.reply(loops.Accepted(operation_id=_id(ticket)), 202, {"Location": location})


def _id(ticket: Ticket) -> str:
    """Loops goes by the key that the client chose."""
    return ticket.key or ticket.id


async def _run(request: web.Request) -> Run:
    return await common.run_of(request, request.match_info["run"], "loops")


async def _held(request: web.Request) -> Held:
    name = request.match_info["id"]
    held = await common.held(request, name)
    if held.info().training_client_id != request.match_info["run"]:
        message = f"no such operation: {checks.shown(name)}"
        raise ResourceNotFoundError(message, resource_type="operation", resource_id=name)
    return held


def _failed(name: str, error: TGTinkerError) -> loops.Outcome:
    return loops.Outcome(
        status="error",
        operation_id=name,
        error=error.message,
        error_class=_builtin(error),
        code=error.code,
        details=error.details,
        request_id=error.request_id,
    )


def _builtin(error: TGTinkerError) -> str:
    """The builtin that the error is one of: what a Loops client is told as its class."""
    kinds = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    first = next(kinds)
    return "RuntimeError" if first == "Exception" else first
