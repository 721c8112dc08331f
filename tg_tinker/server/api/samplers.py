"""The Loops data plane of a sampler: ``/sample`` with its version gate, and what it serves."""

from __future__ import annotations

import hashlib
import secrets

from aiohttp import web

from tg_tinker.errors import SamplerNotReadyError
from tg_tinker.server.api import common, query
from tg_tinker.server.middleware import REQUEST_ID, error_response
from tg_tinker.server.serving.published import Weights
from tg_tinker.server.serving.samplers import Sampler
from tg_tinker.server.work.generations import Completion, Generations, generate, seed_of
from tg_tinker.types.loops_results import SampledSequence, SampleResponse
from tg_tinker.wire import completions, headers, loops
from tg_tinker.wire.checkpoint_uri import CheckpointUri

BASE = "/loops/samplers/{sampler}"


def routes() -> list[web.RouteDef]:
    """Every route of this file."""
    return [
        web.post(BASE + loops.SAMPLE.path, sample),
        web.get(BASE + loops.SERVED_VERSION.path, served_version),
        web.get(BASE + loops.MODELS.path, models),
        web.post(BASE + loops.WAKE.path, wake),
        web.get(BASE + loops.HEALTH.path, wake),
    ]


async def sample(request: web.Request) -> web.Response:
    """Sample; held while the version that the client insists on is not there, then 408."""
    sampler = await _sampler(request)
    asked = await common.read_as(request, completions.read_request)
    with common.rooms_of(request).sampling.one(sampler.tenant):
        weights = await _weights(request, sampler)
        if weights is None:
            return _not_yet(request, sampler)
        response = await _complete(request, sampler, asked, weights)
    body = completions.response_body(response, model=sampler.model.ref, request_id=f"cmpl-{request[REQUEST_ID]}")
    return common.reply(body, extra={headers.SERVED_POLICY_VERSION: str(weights.version)})


async def served_version(request: web.Request) -> web.Response:
    """The newest version served; with ``min`` held until that one is."""
    sampler = await _sampler(request)
    minimum = query.whole(request, "min", 0)
    if sampler.run is not None and minimum:
        await sampler.run.versions.reached(minimum, common.seconds_to_hold(request))
    newest = 0 if sampler.run is None else sampler.run.versions.newest
    return common.reply(loops.PolicyVersion(policy_version=newest))


async def models(request: web.Request) -> web.Response:
    """The base model and, of a run, its adapter."""
    sampler = await _sampler(request)
    data = [{"id": sampler.model.ref, "object": "model", "parent": None}]
    if sampler.run is not None:
        data.append({"id": sampler.run.id, "object": "model", "parent": sampler.model.ref})
    return common.reply({"object": "list", "data": data})


async def wake(request: web.Request) -> web.Response:
    """It never sleeps."""
    return common.reply({"status": "ok", "base_model": (await _sampler(request)).model.ref})


async def _weights(request: web.Request, sampler: Sampler) -> Weights | None:
    """What the headers ask for; None where it is not there in time."""
    published, run = common.rooms_of(request).published, sampler.run
    path = request.headers.get(headers.CHECKPOINT_PATH)
    uri = sampler.checkpoint if path is None else CheckpointUri.parse(path, headers.CHECKPOINT_PATH)
    exact, minimum = _version(request, headers.EXACT_POLICY_VERSION), _version(request, headers.MIN_POLICY_VERSION)
    # A published client that names both wants the checkpoint until the version takes over.
    if uri is not None and (run is None or not minimum or run.versions.bumped < minimum):
        return await published.checkpoint(sampler.tenant, sampler.model, uri)
    if run is None:
        return Weights(None, 0)
    wanted = max(exact or 0, minimum or 0)
    if not await run.versions.reached(wanted, common.seconds_to_hold(request)):
        return None
    return await (published.newest(run) if exact is None else published.exact(run, exact))


async def _complete(
    request: web.Request, sampler: Sampler, asked: completions.CompletionRequest, weights: Weights
) -> SampleResponse:
    rooms, params = common.rooms_of(request), asked.params
    seed = _seed(request) if params.seed is None else params.seed
    room = sampler.model.base.max_length - len(asked.prompt)
    stops = (params.stop,) if isinstance(params.stop, str) else params.stop or ()
    requests = [
        rooms.engine.generation(
            prompt=asked.prompt,
            adapter=weights.adapter,
            max_tokens=max(1, room) if params.max_tokens is None else params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k if params.top_k > 0 else None,
            stop=tuple(stop for stop in stops if isinstance(stop, str)),
            stop_token_ids=frozenset(stop for stop in stops if isinstance(stop, int)),
            seed=seed_of(seed, index),
            cache_key=sampler.tenant,
            prompt_logprobs=asked.prompt_logprobs and index == 0,
            topk_prompt_logprobs=asked.topk_prompt_logprobs if index == 0 else 0,
        )
        for index in range(asked.num_samples)
    ]
    made = await generate(rooms.scheduler, Generations(sampler.model.sampler, requests))
    return _response(asked, made, weights)


def _seed(request: web.Request) -> int:
    """A seed where the client names none: drawn, or made of the key, so that a try that is repeated draws the same."""
    key = common.idempotency_key(request)
    if key is None:
        return secrets.randbits(63)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1


def _response(asked: completions.CompletionRequest, made: list[Completion], weights: Weights) -> SampleResponse:
    first = made[0].generation
    return SampleResponse(
        sequences=tuple(
            SampledSequence(
                tokens=one.generation.tokens,
                logprobs=one.generation.logprobs,
                stop_reason="length" if one.generation.finish_reason == "length" else "stop",
                text=one.generation.text,
            )
            for one in made
        ),
        policy_version=weights.version,
        prompt_token_ids=asked.prompt,
        prompt_logprobs=first.prompt_logprobs if asked.prompt_logprobs else None,
        topk_prompt_logprobs=first.topk_prompt_logprobs if asked.topk_prompt_logprobs else None,
    )


def _not_yet(request: web.Request, sampler: Sampler) -> web.Response:
    version = max(_version(request, name) or 0 for name in (headers.EXACT_POLICY_VERSION, headers.MIN_POLICY_VERSION))
    newest = 0 if sampler.run is None else sampler.run.versions.newest
    error = SamplerNotReadyError(f"version {version} is not served yet; the newest is {newest}", version=version)
    return error_response(request, error, loops.PENDING, exact_status=True)


def _version(request: web.Request, name: str) -> int | None:
    text = request.headers.get(name)
    return None if text is None else query.digits(name, text)


async def _sampler(request: web.Request) -> Sampler:
    rooms = common.rooms_of(request)
    return await rooms.samplers.awake(common.tenant_of(request), request.match_info["sampler"], rooms.models)
