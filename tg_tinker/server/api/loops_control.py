"""The Loops control plane under ``/v1/loops``: sessions, trainers, samplers, checkpoints. Dedicated flavour."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import attrs
from aiohttp import web

from tg_tinker.server.api import common, loops, samplers
from tg_tinker.server.serving.published import check_serves
from tg_tinker.server.serving.samplers import Sampler
from tg_tinker.server.training.runs import Run
from tg_tinker.types import checks
from tg_tinker.types.loops_results import ServerCapabilities, SupportedModel
from tg_tinker.types.losses import LOSSES
from tg_tinker.wire import codec, headers
from tg_tinker.wire import loops as wire
from tg_tinker.wire.checkpoint_uri import SAMPLER_WEIGHTS, CheckpointUri

_ACTIVE = wire.StatusName(name="ACTIVE")


def routes() -> list[web.RouteDef]:
    """Every route of this file."""
    return [
        web.post(wire.CREATE_SESSION.path, create_session),
        web.post(wire.CREATE_TRAINER.path, create_trainer),
        web.post("/v1/loops/runs", create_run),
        web.get("/v1/loops/runs", list_runs),
        web.get(wire.GET_RUN.path, get_run),
        web.post(wire.DEACTIVATE_RUN.path, deactivate_run),
        web.post(wire.CREATE_SAMPLER.path, create_sampler),
        web.get("/v1/loops/deployments/{id}", deployment),
        web.get("/v1/models/{model}/deployments/{id}", model_deployment),
        web.get(wire.CAPABILITIES.path, capabilities),
        web.get("/v1/teams", teams),
    ]


async def create_session(_: web.Request) -> web.Response:
    """A name to group runs by."""
    return common.reply(wire.SessionEnvelope(session=wire.Session(id=f"sess-{secrets.token_hex(12)}")))


async def create_trainer(request: web.Request) -> web.Response:
    """Make a run; answered when its model is loaded."""
    return common.reply(wire.RunEnvelope(run=_run_view(request, await _new_run(request))))


async def create_run(request: web.Request) -> web.Response:
    """Make a run together with its sampler, as clients before 0.14 do; ``save_state`` publishes to it as well."""
    run = await _new_run(request, with_sampler=True)
    sampler = common.rooms_of(request).samplers.of_run(run)
    paired = attrs.asdict(_sampler_view(request, sampler))
    return common.reply(wire.RunEnvelope(run=attrs.evolve(_run_view(request, run), sampler=paired)))


async def list_runs(request: web.Request) -> web.Response:
    """The tenant's runs, newest first."""
    runs = common.rooms_of(request).runs.of_tenant(common.tenant_of(request), "loops")
    return common.reply({"runs": [_run_view(request, run) for run in runs]})


async def get_run(request: web.Request) -> web.Response:
    """One run: enough to attach to it without resetting anything."""
    run = await common.run_of(request, request.match_info["id"], "loops")
    return common.reply(wire.RunEnvelope(run=_run_view(request, run)))


async def deactivate_run(request: web.Request) -> web.Response:
    """End a run: what is queued is cancelled, its sampler is gone, its checkpoints stay."""
    run = await common.run_of(request, request.match_info["id"], "loops")
    await common.creation_of(request).end(run)
    return common.reply({"id": run.id, "base_model": run.model.ref})


async def create_sampler(request: web.Request) -> web.Response:
    """The sampler of a run, of a base model, or of a checkpoint."""
    body = await common.read(request, wire.SamplerRequest)
    sampler = await _sampler(request, body)
    return common.reply(wire.SamplerEnvelope(sampler=_sampler_view(request, sampler)))


async def deployment(request: web.Request) -> web.Response:
    """A trainer's deployment runs as long as its run is known."""
    name = request.match_info["id"]
    run = await common.run_of(request, name.removeprefix("dep-"), "loops")
    return common.reply({"deployment": {"id": f"dep-{run.id}", "run_id": run.id, "status": {"name": "RUNNING"}}})


async def model_deployment(request: web.Request) -> web.Response:
    """A sampler's deployment, likewise."""
    name = request.match_info["id"]
    common.rooms_of(request).samplers.get(common.tenant_of(request), name.removeprefix("dep-"))
    return common.reply({"id": name, "status": "ACTIVE"})


async def capabilities(request: web.Request) -> web.Response:
    """What is served here; other models load from the hub or from a folder when they are asked for."""
    loaded = {model.ref: model.base.max_length for model in common.rooms_of(request).models.loaded()}
    names = {"tg-tinker/tiny": None, "tg-tinker/smollm2-135m": None, **loaded}
    supported = tuple(SupportedModel(model_name=ref, max_context_length=size) for ref, size in names.items())
    return common.reply(
        ServerCapabilities(supported_models=supported, losses=tuple(LOSSES), extensions=headers.OFFERED)
    )


async def teams(_: web.Request) -> web.Response:
    """There are none: a key belongs to a tenant."""
    return common.reply({"teams": []})


async def _new_run(request: web.Request, **settled: Any) -> Run:
    fields = await common.read_as(request, dict)
    if fields.get("base_checkpoint") is not None:
        raise checks.refuse("base_checkpoint", "nothing: name a checkpoint by its path", fields["base_checkpoint"])
    body = attrs.evolve(codec.decode(wire.TrainerRequest, fields), **settled)
    key = common.idempotency_key(request)
    return await common.creation_of(request).loops_run(common.tenant_of(request), body, key)


async def _sampler(request: web.Request, body: wire.SamplerRequest) -> Sampler:
    rooms, tenant = common.rooms_of(request), common.tenant_of(request)
    if sum(given is not None for given in (body.run_id, body.base_model, body.model_path)) != 1:
        raise checks.refuse("run_id", "exactly one of run_id, base_model and model_path", body.run_id)
    if body.run_id is not None:
        return rooms.samplers.of_run(await common.run_of(request, body.run_id, "loops"))
    if body.base_model is not None:
        return rooms.samplers.of_model(tenant, await rooms.models.get(body.base_model))
    uri = CheckpointUri.parse(body.model_path, "model_path")
    check_serves(uri)
    record = await asyncio.to_thread(rooms.store.find, tenant, uri.run_id, SAMPLER_WEIGHTS, uri.name)
    model = await rooms.models.get(str(record.metadata["base_model"]))
    await rooms.published.checkpoint(tenant, model, uri)
    return rooms.samplers.of_model(tenant, model, uri)


def _run_view(request: web.Request, run: Run) -> wire.Run:
    return wire.Run(
        id=run.id,
        session_id=run.config.get("session_id"),
        base_model=run.model.ref,
        base_url=common.own_url(request, loops.BASE.format(run=run.id)),
        created_at=run.created_at,
        status=_ACTIVE,
        deployment_id=f"dep-{run.id}",
        name=run.config.get("name") or run.model.ref,
        lora_rank=run.config.get("lora_rank"),
        max_seq_len=run.config.get("max_seq_len"),
    )


def _sampler_view(request: web.Request, sampler: Sampler) -> wire.Sampler:
    return wire.Sampler(
        id=sampler.id,
        base_url=common.own_url(request, samplers.BASE.format(sampler=sampler.id)),
        base_model=sampler.model.ref,
        created_at=sampler.created_at,
        status=_ACTIVE,
        model_id=f"mdl-{sampler.id}",
        deployment_id=f"dep-{sampler.id}",
    )
