"""The sampler's ``/sample``: a completions body with token ids in and out, as the Loops sampler speaks it.

Both directions of both bodies are here. The version that sampled travels in the ``x-trainers-policy-version`` header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from tg_tinker.errors import ServerError
from tg_tinker.types import checks
from tg_tinker.types.loops import ModelInput, SamplingParams, token_ids
from tg_tinker.types.loops_results import SampledSequence, SampleResponse
from tg_tinker.wire import headers

#: what a published client can ask for beyond this server; to leave it out would answer another question
_NOT_OFFERED = ("include_routed_experts", "structured_outputs")


@attrs.frozen(kw_only=True)
class CompletionRequest:
    """What the sampler is asked: ``num_samples`` completions of one prompt."""

    prompt: tuple[int, ...]
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0


def request_body(
    prompt: ModelInput,
    params: SamplingParams,
    *,
    num_samples: int = 1,
    prompt_logprobs: bool = False,
    topk_prompt_logprobs: int = 0,
) -> dict[str, Any]:
    """The JSON body of a sample request; keys that say nothing are left out, as the published client does."""
    body: dict[str, Any] = {
        "prompt": prompt.to_numpy(),
        "n": num_samples,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
    }
    if prompt_logprobs or topk_prompt_logprobs:
        body["prompt_logprobs"] = topk_prompt_logprobs
    optional = {
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "top_k": params.top_k if params.top_k > 0 else None,
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    if params.stop:
        stops = [params.stop] if isinstance(params.stop, str) else list(params.stop)
        body["stop" if isinstance(stops[0], str) else "stop_token_ids"] = stops
    return body


def read_request(body: Mapping[str, Any]) -> CompletionRequest:
    """The request of a body; unknown keys are ignored. Raises ``InvalidRequestError`` naming the field."""
    for name in _NOT_OFFERED:
        if body.get(name):
            raise checks.refuse(name, "nothing: this server does not offer it", body[name])
    prompt = body.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise checks.refuse("prompt", "a non-empty list of token ids (text only)", prompt)
    tokens = token_ids(prompt, "prompt").tolist()
    params = SamplingParams(
        max_tokens=body.get("max_tokens"),
        seed=body.get("seed"),
        stop=_stops(body),
        temperature=body.get("temperature", 1.0),
        top_k=-1 if body.get("top_k") is None else body["top_k"],
        top_p=body.get("top_p", 1.0),
    )
    wanted = body.get("prompt_logprobs")
    checks_of = {"n": body.get("n", 1), "prompt_logprobs": 0 if wanted is None else wanted}
    for name, low, high in (("n", 1, 1024), ("prompt_logprobs", 0, 20)):
        value = checks_of[name]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise checks.refuse(name, f"an integer from {low} to {high}", value)
    return CompletionRequest(
        prompt=tuple(tokens),
        params=params,
        num_samples=checks_of["n"],
        prompt_logprobs=wanted is not None,
        topk_prompt_logprobs=checks_of["prompt_logprobs"],
    )


def response_body(response: SampleResponse, *, model: str, request_id: str) -> dict[str, Any]:
    """The JSON body of an answer. Tokens stand both as ``token_ids`` and as ``"token_id:N"`` for older clients."""
    prompt_logprobs = _prompt_logprobs(response)
    choices = []
    for index, sequence in enumerate(response.sequences):
        logprobs = {
            "tokens": [f"token_id:{token}" for token in sequence.tokens],
            "token_logprobs": list(sequence.logprobs or ()),
            "top_logprobs": None,
            "text_offset": [],
        }
        choice: dict[str, Any] = {
            "index": index,
            "text": sequence.text or "",
            "finish_reason": sequence.stop_reason,
            "token_ids": list(sequence.tokens),
            "logprobs": logprobs,
        }
        if prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs
        choices.append(choice)
    generated = sum(len(sequence.tokens) for sequence in response.sequences)
    usage = {"prompt_tokens": len(response.prompt_token_ids or ()), "completion_tokens": generated}
    return {
        "id": request_id,
        "object": "text_completion",
        "created": 0,
        "model": model,
        "choices": choices,
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


def read_response(body: Mapping[str, Any], answered: Mapping[str, str], prompt: Sequence[int]) -> SampleResponse:
    """The answer of a body and its headers; ``prompt`` is what was asked. Raises ``ServerError`` for foreign shapes."""
    try:
        choices = sorted(body["choices"], key=lambda choice: choice.get("index", 0))
        sequences = tuple(_sequence(choice) for choice in choices)
        tables = choices[0].get("prompt_logprobs") if choices else None
        version = answered.get(headers.SERVED_POLICY_VERSION)
        return SampleResponse(
            sequences=sequences,
            policy_version=None if version is None else int(version),
            prompt_token_ids=tuple(prompt),
            prompt_logprobs=_chosen(tables, prompt),
            topk_prompt_logprobs=_tables(tables),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ServerError(f"the sampler's answer is not a completion: {error!r}", code="BAD_ANSWER") from error


def _sequence(choice: Mapping[str, Any]) -> SampledSequence:
    logprobs = choice.get("logprobs") or {}
    tokens = choice.get("token_ids")
    if tokens is None:
        tokens = [int(str(token).removeprefix("token_id:")) for token in logprobs.get("tokens", ())]
    values = logprobs.get("token_logprobs")
    return SampledSequence(
        tokens=tuple(tokens),
        logprobs=None if values is None else tuple(map(float, values)),
        stop_reason="length" if choice.get("finish_reason") == "length" else "stop",
        text=choice.get("text"),
    )


def _stops(body: Mapping[str, Any]) -> Any:
    """What ends a completion: texts or token ids, never both."""
    texts, tokens = (None if body.get(name) == [] else body.get(name) for name in ("stop", "stop_token_ids"))
    if tokens is None:
        return tuple(texts) if isinstance(texts, list) else texts
    if texts is not None:
        raise checks.refuse("stop_token_ids", "nothing beside stop", tokens)
    if not isinstance(tokens, list) or {type(token) for token in tokens} != {int}:
        raise checks.refuse("stop_token_ids", "a list of token ids", tokens)
    return tuple(tokens)


def _prompt_logprobs(response: SampleResponse) -> list[dict[str, Any] | None] | None:
    """``[null, {"<token>": {"logprob", "rank"}}, ...]``: at each position the prompt's own token, then the top ones."""
    if response.prompt_logprobs is None:
        return None
    tables: list[dict[str, Any] | None] = []
    top = response.topk_prompt_logprobs or (None,) * len(response.prompt_logprobs)
    for token, logprob, best in zip(response.prompt_token_ids or (), response.prompt_logprobs, top, strict=True):
        if logprob is None:
            tables.append(None)
            continue
        table: dict[str, Any] = {
            str(other): {"logprob": value, "rank": rank} for rank, (other, value) in enumerate(best or (), start=1)
        }
        table.setdefault(str(token), {"logprob": logprob, "rank": None})
        tables.append(table)
    return tables


def _chosen(tables: Any, prompt: Sequence[int]) -> tuple[float | None, ...] | None:
    if tables is None:
        return None
    pairs = zip(prompt, tables, strict=True)
    return tuple(None if table is None else float(table[str(token)]["logprob"]) for token, table in pairs)


def _tables(tables: Any) -> tuple[tuple[tuple[int, float], ...] | None, ...] | None:
    if tables is None:
        return None
    return tuple(None if table is None else _ranked(table) for table in tables)


def _ranked(table: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    ranked = [(int(token), float(entry["logprob"])) for token, entry in table.items() if entry.get("rank") is not None]
    return tuple(sorted(ranked, key=lambda pair: -pair[1]))
