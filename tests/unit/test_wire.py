"""Routes, frames, completions and digests: the small formats of the wire."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker import sampling
from tg_tinker.core.reply import Reply
from tg_tinker.errors import (
    DPBudgetExceededError,
    FutureCancelledError,
    InvalidRequestError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.loops import plane
from tg_tinker.types.batch import BatchData
from tg_tinker.types.loops import ModelInput, SamplingParams
from tg_tinker.types.loops_results import SampledSequence, SampleResponse
from tg_tinker.wire import codec, completions, digest, frames, headers, tg
from tg_tinker.wire import loops as loops_wire
from tg_tinker.wire.errors import from_wire
from tg_tinker.wire.route import Route

ROUTES = [route for table in (tg, loops_wire) for route in vars(table).values() if isinstance(route, Route)]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_no_id_reaches_another_route(route: Route[Any]) -> None:
    """A part is quoted whole: slashes, dots, queries and spaces in an id stay inside it."""
    parts = {"id": "../x/y?z#a b%2F"} if "{id}" in route.path else {}
    url = route.url(**parts)
    assert url.count("/") == route.path.count("/")
    assert not set("?# ") & set(url)


def test_operations_are_named_once_per_wire() -> None:
    """Method and path identify a route on its wire."""
    for table in (tg, loops_wire):
        keys = [(route.method, route.path) for route in vars(table).values() if isinstance(route, Route)]
        assert len(keys) == len(set(keys))


def test_frames_survive_any_cutting() -> None:
    """A stream of frames is read the same whatever the pieces it arrives in."""
    stream = b"".join(frames.pack(frame) for frame in ({"item": {"text": "é"}}, {"item": []}, frames.END))
    for size in (1, 2, 3, 5, 1000):
        reader = frames.FrameReader()
        found = [frame for start in range(0, len(stream), size) for frame in reader.feed(stream[start : start + size])]
        assert found == [{"item": {"text": "é"}}, {"item": []}, {"end": True}]


@given(st.lists(st.dictionaries(st.text(), st.integers(-(2**53), 2**53)), max_size=5), st.data())
def test_frames_survive_random_cutting(items: list[dict[str, int]], data: st.DataObject) -> None:
    """Random frames, randomly cut, come out as they went in."""
    stream = b"".join(map(frames.pack, items))
    reader, found, start = frames.FrameReader(), [], 0
    while start < len(stream):
        size = data.draw(st.integers(1, len(stream)))
        found += reader.feed(stream[start : start + size])
        start += size
    assert found == items


def test_an_absurd_frame_length_is_an_error() -> None:
    """A length that no frame has, as from a proxy's HTML page, ends the stream with a typed error."""
    with pytest.raises(ServerError, match="frame of"):
        frames.FrameReader().feed(b"<htm")


def _response(**fields: Any) -> SampleResponse:
    first = SampledSequence(tokens=(5, 6), logprobs=(-0.5, -1.0), stop_reason="stop", text="hi")
    second = SampledSequence(tokens=(7,), logprobs=(-2.0,), stop_reason="length", text="x")
    return SampleResponse(sequences=(first, second), prompt_token_ids=(1, 2), policy_version=3, **fields)


def _across(answer: SampleResponse) -> SampleResponse:
    body = codec.loads(codec.dumps(completions.response_body(answer, model="m", request_id="r")))
    return completions.read_response(body, {headers.SERVED_POLICY_VERSION: "3"}, [1, 2])


def test_a_sample_response_survives_the_completions_format() -> None:
    """Tokens, logprobs, stop reasons, text and the version of the header come back equal."""
    assert _across(_response()) == _response()


def test_prompt_logprobs_survive_the_completions_format() -> None:
    """The prompt's own logprobs and the top ones beside them come back, the chosen token out of the top included."""
    wanted = {"prompt_logprobs": (None, -3.5), "topk_prompt_logprobs": (None, ((9, -0.25), (8, -0.75)))}
    back = _across(_response(**wanted))
    assert back.prompt_logprobs == wanted["prompt_logprobs"]
    assert back.topk_prompt_logprobs == wanted["topk_prompt_logprobs"]


@pytest.mark.parametrize(
    ("params", "extra"),
    [
        (SamplingParams(), {}),
        (SamplingParams(max_tokens=4, seed=1, temperature=0.0, top_k=5, top_p=0.5, stop="end"), {"num_samples": 3}),
        (SamplingParams(stop=("a", "b")), {"prompt_logprobs": True}),
        (SamplingParams(stop=(1, 2)), {"topk_prompt_logprobs": 4, "prompt_logprobs": True}),
    ],
)
def test_a_sample_request_survives_the_completions_format(params: SamplingParams, extra: dict[str, Any]) -> None:
    """What the client asks is what the server reads, whatever keys were left out."""
    body = codec.loads(codec.dumps(completions.request_body(ModelInput.from_ints([1, 2]), params, **extra)))
    asked = completions.read_request(body)
    assert asked.prompt == (1, 2)
    stop = (params.stop,) if isinstance(params.stop, str) else params.stop
    assert asked.params in (params, SamplingParams(**{**_fields(params), "stop": stop}))
    assert asked.num_samples == extra.get("num_samples", 1)
    assert asked.prompt_logprobs == extra.get("prompt_logprobs", False)
    assert asked.topk_prompt_logprobs == extra.get("topk_prompt_logprobs", 0)


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in ("max_tokens", "seed", "temperature", "top_k", "top_p")}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "text"}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1], "n": 0}, "n"),
        ({"prompt": [1], "n": True}, "n"),
        ({"prompt": [1], "max_tokens": -1}, "max_tokens"),
        ({"prompt": [1], "temperature": "hot"}, "temperature"),
        ({"prompt": [1], "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": [1], "stop": [""]}, "stop"),
    ],
    ids=str,
)
def test_a_wrong_sample_request_is_refused_by_field(body: dict[str, Any], field: str) -> None:
    """The server's reader names the field that is wrong."""
    with pytest.raises(InvalidRequestError) as caught:
        completions.read_request(body)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "body", [{}, {"choices": [{"token_ids": ["x"], "logprobs": {"token_logprobs": ["y"]}}]}, {"choices": 3}]
)
def test_a_foreign_answer_is_a_server_error(body: Any) -> None:
    """An answer that is no completion is the server's fault, and says so."""
    with pytest.raises(ServerError, match="not a completion"):
        completions.read_response(body, {}, [1])


def test_a_prompt_that_was_not_scored_is_a_server_error() -> None:
    """Log probabilities that an answer lacks are not an empty list of them."""
    choice = {"index": 0, "token_ids": [5], "finish_reason": "length"}
    body = codec.dumps({"choices": [choice]})
    with pytest.raises(ServerError) as caught:
        sampling._prompt_logprobs(ModelInput.from_ints([1, 2]), Reply(200, {}, body))
    assert caught.value.code == "BAD_ANSWER"


@pytest.mark.parametrize(
    "path", ["bt://loops:/weights/a", "bt://loops:r-1/weights/", "bt://loops:r-1//a", "bt://loops:r-1/weights", 3]
)
def test_a_checkpoint_path_has_all_its_parts(path: object) -> None:
    """A URI with an empty run, kind or name is refused before anything is sent."""
    assert plane.checkpoint_path("bt://loops:r-1/weights/a") == "bt://loops:r-1/weights/a"
    with pytest.raises(InvalidRequestError) as caught:
        plane.checkpoint_path(path)
    assert caught.value.field == "path"


def test_an_error_is_rebuilt_by_code_then_by_status() -> None:
    """Our codes name their class whatever the status; a conflict of somebody else's is nothing more than an error."""
    assert type(from_wire({"code": "FUTURE_CANCELLED"}, 409)) is FutureCancelledError
    assert type(from_wire({"code": "DP_BUDGET_EXCEEDED"}, 500)) is DPBudgetExceededError
    assert type(from_wire({"message": "two writers"}, 409)) is TGTinkerError
    assert type(from_wire({"code": "RUN_NOT_FOUND"}, 400)) is ResourceNotFoundError


def test_older_samplers_name_tokens_as_text() -> None:
    """``token_id:N`` strings are read where there are no ids."""
    choice = {
        "text": "",
        "finish_reason": "stop",
        "logprobs": {"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [-1, -2]},
    }
    assert completions.read_response({"choices": [choice]}, {}, [1]).sequences[0].tokens == (5, 6)


def test_a_tensor_digest_is_the_hash_of_its_canonical_bytes() -> None:
    """The digest is SHA-256 over name, dtype, shape and little-endian bytes, recomputed here by hand."""
    header = b'["a","<f4",[2]]'
    by_hand = hashlib.sha256(len(header).to_bytes(4, "little") + header + np.array([1, 2], "<f4").tobytes()).hexdigest()
    assert digest.tensor_digest({"a": np.array([1, 2], np.float32)}) == f"sha256:{by_hand}"
    assert digest.tensor_digest({"a": np.array([1, 2], ">f4")}) == f"sha256:{by_hand}"


def test_digests_tell_dtype_shape_name_and_key_apart() -> None:
    """Arrays of equal bytes but another name, dtype, shape or key have other digests; memory layout does not matter."""
    one = np.arange(4, dtype=np.int32)
    kinds = {"a": one, "b": one.view(np.float32), "c": one.reshape(2, 2)}
    found = {digest.tensor_digest({"x": array}) for array in kinds.values()}
    found |= {
        digest.tensor_digest({"y": one}),
        digest.tensor_digest({"x": one}, b"key"),
        digest.tensor_digest({"x": one}, b"kez"),
    }
    assert len(found) == 6
    square = np.arange(4.0).reshape(2, 2)
    assert digest.tensor_digest({"x": square}) == digest.tensor_digest({"x": np.asfortranarray(square)})
    assert digest.tensor_digest({"x": np.float32(1.0)}).startswith("sha256:")
    assert digest.tensor_digest({"x": one}, b"key").startswith("hmac-sha256:")


def test_a_batch_hash_does_not_depend_on_how_the_batch_was_given() -> None:
    """Dicts, lists and arrays of the same batch hash alike; other labels do not."""
    rows = [[1, 2], [3, 4]]
    same = {digest.batch_hash({"input_ids": rows}), digest.batch_hash(BatchData(np.array(rows), [[1, 1], [1, 1]]))}
    assert len(same) == 1
    assert digest.batch_hash({"input_ids": rows, "labels": rows}) not in same


def test_canonical_json_has_one_form() -> None:
    """Keys are sorted, there is no space, only ASCII, and NaN is refused."""
    assert digest.canonical_json({"b": 1, "a": ["é"]}) == b'{"a":["\\u00e9"],"b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        digest.canonical_json({"x": math.nan})
