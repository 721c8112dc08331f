"""The TG wire's training routes: ``/v1/training_clients`` and ``/v1/futures``."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import attrs
from aiohttp import web

from tg_tinker.errors import InvalidRequestError
from tg_tinker.server.api import common, query, streams
from tg_tinker.server.records.tickets import Ticket, outcome_of
from tg_tinker.server.training import tg_operations
from tg_tinker.server.training.runs import Run
from tg_tinker.types import arguments, checks, results
from tg_tinker.types.batch import require_labels
from tg_tinker.types.config import TrainingConfig
from tg_tinker.wire import codec, digest, headers, tg

STATUSES = ("active", "completed", "failed")


def routes() -> list[web.RouteDef]:
    """Every route of this file."""
    return [
        web.post(tg.CREATE.path, create),
        web.get(tg.LIST.path, list_clients),
        web.get(tg.GET.path, get_client),
        web.delete(tg.DELETE.path, delete_client),
        web.post(tg.FORWARD_BACKWARD.path, forward_backward),
        web.post(tg.OPTIM_STEP.path, optim_step),
        web.post(tg.SAMPLE.path, sample),
        web.post(tg.SAMPLE_STREAM.path, sample_stream),
        web.post(tg.SAVE_STATE.path, save_state),
        web.post(tg.LOAD_STATE.path, load_state),
    ]


async def create(request: web.Request) -> web.Response:
    """Make a run, from a saved state if the body names one."""
    config, checkpoint_id = await common.read_as(request, _new_run, exact=True)
    key = common.idempotency_key(request)
    run = await common.creation_of(request).tg_run(common.tenant_of(request), config, checkpoint_id, key)
    return common.reply(info(run), 201)


async def list_clients(request: web.Request) -> web.Response:
    """The tenant's runs, newest first."""
    query.only(request, "status", "limit")
    status, limit = query.choice(request, "status", (*STATUSES, tg.READY)), query.limit(request)
    wanted = "active" if status == tg.READY else status
    runs = common.rooms_of(request).runs.of_tenant(common.tenant_of(request), "tg")
    return common.reply([info(run) for run in runs if wanted in {None, run.status}][:limit])


async def get_client(request: web.Request) -> web.Response:
    """One run as it is now."""
    return common.reply(info(await _run(request)))


async def delete_client(request: web.Request) -> web.Response:
    """End a run: what is queued is cancelled, its artifacts stay."""
    run = await _run(request)
    await common.creation_of(request).end(run)
    return common.reply({"training_client_id": run.id, "deleted": True})


async def forward_backward(request: web.Request) -> web.Response:
    """Accept a pass."""
    run, engine = await _run(request), common.rooms_of(request).engine
    body = await common.read(request, tg.ForwardBackwardRequest, exact=True)
    if run.privacy is None:  # with it, a refusal would tell what the examples are like
        require_labels(body.batch)
    label = _batch_hash(run, body)
    ticket = await common.submit(
        request, run, "forward_backward", lambda t: tg_operations.forward_backward(run, engine, t, body, label)
    )
    if body.mode == "train":
        run.passes.accepted(ticket)
    return accepted(ticket)


async def optim_step(request: web.Request) -> web.Response:
    """Accept an optimizer step."""
    run, engine = await _run(request), common.rooms_of(request).engine
    body = await common.read(request, tg.OptimStepRequest, exact=True)
    ticket = await common.submit(request, run, "optim_step", lambda t: tg_operations.optim_step(run, engine, t, body))
    return accepted(ticket)


async def sample(request: web.Request) -> web.Response:
    """Sample with the adapter as it is at this place in the run's order."""
    run, engine = await _run(request), common.rooms_of(request).engine
    body = await common.read_as(request, _sample_request, exact=True)
    prompts, seed = await _prompts(run, body), _seed(body)
    ticket = await common.submit(
        request, run, "sample", lambda _: tg_operations.sample(run, engine, body, prompts, seed)
    )
    return await _answer(request, ticket, abandon=ticket.key is None)


async def sample_stream(request: web.Request) -> web.StreamResponse:
    """The same for one prompt, token by token; the headers go out when the place in the order is taken."""
    run, engine = await _run(request), common.rooms_of(request).engine
    body = await common.read_as(request, _sample_request, exact=True)
    if len(body.prompts) != 1:
        raise checks.refuse("prompts", "a single prompt", list(body.prompts))
    prompts, seed, stream = await _prompts(run, body), _seed(body), streams.TokenStream(body.num_completions)
    ticket = await common.submit(
        request, run, "sample_stream",
        lambda _: tg_operations.sample(run, engine, body, prompts, seed, stream.on_token), keyed=False,
    )  # fmt: skip
    return await streams.respond(request, ticket, stream)


async def save_state(request: web.Request) -> web.Response:
    """Save the run's state as a sealed artifact."""
    run, rooms = await _run(request), common.rooms_of(request)
    body = await common.read(request, tg.SaveStateRequest, exact=True)
    ticket = await common.submit(
        request, run, "save_state", lambda t: tg_operations.save_state(run, rooms.store, t, body)
    )
    return await _answer(request, ticket)


async def load_state(request: web.Request) -> web.Response:
    """Restore a saved state into the run."""
    run, rooms = await _run(request), common.rooms_of(request)
    body = await common.read(request, tg.LoadStateRequest, exact=True)
    ticket = await common.submit(
        request, run, "load_state",
        lambda t: tg_operations.load_state(run, rooms.engine, rooms.store, t, body.artifact_id),
    )  # fmt: skip
    return await _answer(request, ticket)


def accepted(ticket: Ticket) -> web.Response:
    """202 and the future."""
    return common.reply(ticket.info(), 202)


def info(run: Run) -> dict[str, Any]:
    """A run as the TG wire lists it."""
    listed = results.TrainingClientInfo(
        training_client_id=run.id,
        tenant_id=run.tenant,
        model_ref=run.model.ref,
        status=run.status,
        step=run.step,
        created_at=run.created_at,
        config=run.config,
        dp_metrics=None if run.privacy is None else run.privacy.dp_metrics,
    )
    return {**attrs.asdict(listed, recurse=False), "status": tg.READY if listed.status == "active" else listed.status}


async def _run(request: web.Request) -> Run:
    return await common.run_of(request, request.match_info["id"], "tg")


async def _answer(request: web.Request, ticket: Ticket, *, abandon: bool = False) -> web.Response:
    """The result when it is there, or the future at once where the client prefers that.

    ``abandon``: a client that goes away while it waits, and cannot ask again, wants nothing any more.
    """
    if headers.RESPOND_ASYNC in request.headers.get(headers.PREFER, ""):
        return accepted(ticket)
    try:
        await common.ended(request, ticket, None)
    finally:
        if abandon and not ticket.done:
            common.rooms_of(request).tickets.stop(ticket)
    return web.Response(body=await outcome_of(ticket), content_type="application/json")


def _new_run(fields: dict[str, Any]) -> tuple[TrainingConfig, str | None]:
    """A config, and the saved state to start from, if one is named beside its fields."""
    checks.refuse_unknown(TrainingConfig, fields, "checkpoint_id")
    checkpoint_id = arguments.optional_text("checkpoint_id", fields.pop("checkpoint_id", None))
    return codec.decode(TrainingConfig, fields), checkpoint_id


def _sample_request(fields: dict[str, Any]) -> tg.SampleRequest:
    """What is asked of a sample; one prompt, or one stop, may be a plain string."""
    checks.refuse_unknown(tg.SampleRequest, fields)
    for name in ("prompts", "stop_sequences"):
        if isinstance(fields.get(name), str):
            fields[name] = [fields[name]]
    return codec.decode(tg.SampleRequest, {name: value for name, value in fields.items() if value is not None})


def _batch_hash(run: Run, body: tg.ForwardBackwardRequest) -> str:
    """The batch's hash; one that was passed in our scheme is verified, any other label is echoed.

    Under differential privacy the hash is keyed, and what was passed stands behind it.
    """
    given = body.batch_hash
    if given is not None and given.startswith("sha256:"):
        computed = digest.batch_hash(body.batch)
        if given != computed:
            message = f"batch_hash: the batch that arrived has {computed}, not {given}"
            raise InvalidRequestError(message, field="batch_hash", constraint="the hash of this batch")
    if run.privacy is None:
        return given or digest.batch_hash(body.batch)
    keyed = digest.batch_hash(body.batch, run.privacy.hash_key)
    return keyed if given is None else f"{keyed} {given}"


async def _prompts(run: Run, body: tg.SampleRequest) -> list[tuple[int, ...]]:
    encoded, room = [], run.model.base.max_length - 1
    for index, prompt in enumerate(body.prompts):
        encoded.append(await run.model.encode(prompt))
        if not 1 <= len(encoded[-1]) <= room:
            raise checks.refuse(f"prompts[{index}]", f"1 to {room} tokens, of the model's {room + 1}", len(encoded[-1]))
        await asyncio.sleep(0)  # thousands of prompts take seconds, and other requests want their turn
    return encoded


def _seed(body: tg.SampleRequest) -> int:
    return secrets.randbits(63) if body.seed is None else body.seed
