"""Requests that are wrong on purpose: each is refused by name, with a request id, and the server goes on as before."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from typing import Any

import pytest
from fixtures.fake_engine import MODEL, Characters
from fixtures.server_client import BATCH, KEY, datum

from tg_tinker.server.api import common

DEEP = json.loads('{"a":' * 900 + "1" + "}" * 900)


async def _send(client, method, path, *headers, body=b""):
    """One request as bytes, since proper clients refuse to send such headers; gives its status and its body."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", b"Connection: close", *headers]
    lines.append(b"Content-Length: %d" % len(body))
    reader, writer = await asyncio.open_connection(client.server.host, client.server.port)
    try:
        writer.write(b"\r\n".join([*lines, b"", body]))
        async with asyncio.timeout(20):
            head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return int(head.split()[1]), json.loads(rest)


def _authorized(*headers):
    return f"Authorization: Bearer {KEY}".encode(), *headers


@pytest.mark.parametrize(
    ("path", "body", "field", "near"),
    [
        ("", {"model_ref": MODEL, "chekpoint_id": "art-1"}, "chekpoint_id", "checkpoint_id"),
        ("", {"model_ref": MODEL, "lora_config": {"rnk": 4}}, "lora_config.rnk", "rank"),
        ("", {"model_ref": MODEL, "dp_config": {"target_eps": 4}}, "dp_config.target_eps", "target_epsilon"),
        ("forward_backward", {"batch": BATCH, "batch_hsh": "x"}, "batch_hsh", "batch_hash"),
        ("optim_step", {"apply_noise": False}, "apply_noise", "apply_dp_noise"),
        ("sample", {"prompts": "a", "max_token": 3}, "max_token", "max_tokens"),
        ("sample", {"prompts": "a", "max_token": None}, "max_token", "max_tokens"),
        ("sample_stream", {"prompts": "a", "temprature": 1.0}, "temprature", "temperature"),
        ("save_state", {"include_optimiser": False}, "include_optimiser", "include_optimizer"),
        ("load_state", {"artifact_id": "art-1", "artefact_id": "art-2"}, "artefact_id", "artifact_id"),
    ],
)
async def test_the_tg_wire_refuses_keys_that_it_does_not_know(client, path, body, field, near):
    """A misspelt key of any TG body is a 422 that names it and the nearest known name, and nothing is begun."""
    base = f"{await client.create(MODEL)}/{path}" if path else "/v1/training_clients"
    answer = await client.post(base, body)
    assert (answer.status, answer.error["details"]["field"]) == (422, field)
    assert f"did you mean {near!r}?" in answer.error["message"]
    assert (await client.get("/v1/futures")).json == []


TWICE = {
    "target_epsilon": ("", b'{"model_ref": "fake/model", "dp_config": {"target_epsilon": 1, "target_epsilon": 100}}'),
    "model_ref": ("", b'{"model_ref": "other/model", "metadata": {"a": "x: y"}, "model_ref": "fake/model"}'),
    "input_ids": ("forward_backward", b'{"batch": {"input_ids": [[1, 2]], "input_ids": [[3, 4]]}}'),
    "apply_dp_noise": ("optim_step", b'{"apply_dp_noise": true, "apply_dp_noise": false}'),
    "prompts": ("sample", b'{"prompts": "a", "max_tokens": 1, "prompts": "b: c"}'),
    "seed": ("sample_stream", b'{"prompts": "a", "max_tokens": 1, "seed": 1, "seed": 1}'),
    "a": ("save_state", b'{"metadata": {"b": [1, {"a": 1, "a": 2}]}}'),
    "artifact_id": ("load_state", b'{"artifact_id": "art-1", "artifact_\\u0069d": "art-2"}'),
}


@pytest.mark.parametrize("name", TWICE)
async def test_the_tg_wire_refuses_a_key_that_comes_twice(client, name):
    """Of two equal keys, however they are written, neither is taken: a 422 names the key, and nothing is begun."""
    path, body = TWICE[name]
    run = f"{await client.create(MODEL)}/{path}" if path else "/v1/training_clients"
    status, answer = await _send(client, "POST", run, *_authorized(), body=body)
    assert (status, answer["error"]["details"]["field"]) == (422, name)
    assert answer["error"]["message"].endswith("expected one value, got two")
    assert (await client.get("/v1/futures")).json == []


async def test_colons_in_texts_are_no_keys(client):
    """A body whose texts look like keys is taken, and so is a deep one; one too deep to be read again is refused."""
    run = await client.create(MODEL)
    told = {"a": '{"a": 1, "a": 2}', "b": [[{"a": ":"}], {"a": "::"}, "a: b"]}
    saved = await client.post(f"{run}/save_state", {"metadata": told})
    assert (saved.status, saved.json["metadata"]) == (200, told)
    deep = b'{"metadata": ' + b'{"a":' * 1000 + b'":"' + b"}" * 1001
    status, answer = await _send(client, "POST", f"{run}/save_state", *_authorized(), body=deep)
    assert (status, answer["error"]["details"]["field"] in {"body", "metadata"}) == (422, True)


async def test_the_loops_wire_ignores_keys_that_it_does_not_know(client):
    """Published Loops clients send keys of their own, at every level; they are served."""
    trainer, sampler = await client.trainer(MODEL, availability_model="dedicated")
    done = await client.operate(trainer, "forward_backward", {"data": [{**datum(1, 2), "mine": 1}], "mine": 1})
    assert done["status"] == "done"
    assert (await client.operate(trainer, "optim_step", {"adam_params": {"mine": 1}}))["status"] == "done"
    assert (await client.post(f"{sampler}/sample", {"prompt": [1], "max_tokens": 1, "mine": 1})).status == 200


@pytest.mark.parametrize("body", [[], [1], "text", 3, True])
@pytest.mark.parametrize("path", ["optim_step", "save_state", "sample", "forward_backward"])
async def test_a_body_is_an_object(client, path, body):
    """A list, a text or a number in the place of a body is refused, also where every field has a default."""
    run = await client.create(MODEL)
    answer = await client.post(f"{run}/{path}", body)
    assert (answer.status, answer.error["details"]["field"]) == (422, "body")


@pytest.mark.parametrize(
    ("name", "body", "field"),
    [
        ("optim_step", {"adam_params": []}, "adam_params"),
        ("optim_step", {"adam_params": "x"}, "adam_params"),
        ("forward", {"data": {}}, "data"),
        ("forward", {"data": [{**datum(1), "loss_fn_inputs": ""}]}, "data[0].loss_fn_inputs"),
        ("forward", {"data": [datum(1)], "loss_fn_config": {"skip_token_normalization": 7}},
         "loss_fn_config.skip_token_normalization"),
    ],
)  # fmt: skip
async def test_nothing_empty_passes_for_an_object(client, name, body, field):
    """An empty list or text where an object belongs is refused, not taken for one without fields."""
    trainer, _ = await client.trainer(MODEL)
    answer = await client.post(f"{trainer}/{name}", body)
    assert (answer.status, answer.error["details"]["field"]) == (422, field)


LISTS = ("/v1/futures", "/v1/training_clients", "/v1/artifacts", "/v1/audit_logs", "/api/v1/futures")


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("limit", ["0", "-1", "1001", "9" * 5000, "1.5", "1_0", "many", ""])
async def test_an_absurd_limit_is_refused_by_every_list(client, path, limit):
    """No list takes a limit that is not a whole number from 1 to 1000."""
    answer = await client.get(f"{path}?limit={limit}")
    assert (answer.status, answer.error["details"]["field"]) == (422, "limit")
    assert answer.error["details"]["constraint"] == "a whole number from 1 to 1000"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("/v1/futures?status=bogus", "status"),
        ("/v1/futures?status=", "status"),
        ("/v1/training_clients?status=bogus", "status"),
        ("/v1/futures?offset=5", "offset"),
        ("/v1/artifacts?status=active", "status"),
        ("/v1/audit_logs?offset=-1", "offset"),
        ("/v1/audit_logs?offset=1e3", "offset"),
        (f"/v1/audit_logs?offset={'9' * 30}", "offset"),
        ("/v1/audit_logs?start_time=0001-01-01T00:00:00%2B14:00", "start_time"),
        ("/v1/audit_logs?end_time=9999-12-31T23:59:59-12:00", "end_time"),
        ("/v1/loops/checkpoints/art-1/files?page_size=0", "page_size"),
        ("/v1/loops/checkpoints/art-1/files?page_token=x", "page_token"),
    ],
)
async def test_a_list_is_asked_only_for_what_it_has(client, query, field):
    """Unknown words, numbers, times and parameters of a query are a 422 that names them, never an empty list."""
    answer = await client.get(query)
    assert (answer.status, answer.error["details"]["field"]) == (422, field)


async def test_a_wrong_status_is_told_the_choices(client):
    """The error names every status that a future can have."""
    answer = await client.get("/v1/futures?status=bogus")
    assert answer.error["details"]["constraint"] == "one of pending, running, completed, failed, cancelled"


@pytest.mark.parametrize(
    ("headers", "status", "field"),
    [
        ((b"Authorization: Bearer \xff\xfe",), 401, None),
        (_authorized(b"Idempotency-Key: \xff\xfe"), 422, "Idempotency-Key"),
        (_authorized(b"Idempotency-Key: a\tb"), 422, "Idempotency-Key"),
        (_authorized(b"Idempotency-Key: "), 422, "Idempotency-Key"),
        (_authorized(b"Idempotency-Key: " + b"x" * 129), 422, "Idempotency-Key"),
        (_authorized(b"Origin: http://["), 403, None),
        (_authorized(b"Content-Encoding: gzip"), 422, "body"),
        (_authorized(b"Content-Encoding: deflate"), 422, "body"),
    ],
)
async def test_bad_headers_are_refused(client, headers, status, field):
    """Bytes that are no text, addresses that are none and encodings that the body is not in: typed errors."""
    run = await client.create(MODEL)
    body = json.dumps({"batch": BATCH}).encode()
    told, answer = await _send(client, "POST", f"{run}/forward_backward", *headers, body=body)
    assert (told, answer["error"]["details"].get("field")) == (status, field)
    assert answer["error"]["request_id"].startswith("req-")
    assert (await client.get("/v1/futures")).json == []


@pytest.mark.parametrize("version", ["9" * 5000, "9" * 25, "-1", "1.5", "\u0663", ""])
@pytest.mark.parametrize("name", ["X-Min-Policy-Version", "X-TG-Exact-Policy-Version"])
async def test_a_version_is_a_number_that_there_can_be(client, name, version):
    """What no version can be is refused by the header's name, and is not waited for."""
    _, sampler = await client.trainer(MODEL)
    answer = await client.call("POST", f"{sampler}/sample", {"prompt": [1]}, **{name: version})
    assert (answer.status, answer.error["details"]["field"]) == (422, name)


async def test_a_body_that_inflates_beyond_the_limit_is_refused(serve):
    """A small body that says it is compressed is bounded by what it becomes."""
    client = await serve(max_body_bytes=100_000)
    run = await client.create(MODEL)
    packed = gzip.compress(b" " * (64 << 20))
    headers = _authorized(b"Content-Encoding: gzip")
    status, answer = await _send(client, "POST", f"{run}/forward_backward", *headers, body=packed)
    assert (status, answer["error"]["details"]["field"]) in {(413, "body"), (422, "body")}
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["status"] == "completed"


async def test_a_body_that_never_ends_is_not_waited_for_for_ever(client, monkeypatch):
    """A body that stalls is refused in the end; the server goes on."""
    monkeypatch.setattr(common, "SLOWEST_BODY", 0.2)
    run = await client.create(MODEL)
    reader, writer = await asyncio.open_connection(client.server.host, client.server.port)
    lines = (f"POST {run}/optim_step HTTP/1.1".encode(), b"Host: localhost", *_authorized(), b"Content-Length: 9")
    try:
        writer.write(b"\r\n".join([*lines, b"", b"{"]))
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()
    assert head.startswith(b"HTTP/1.1 422 ")
    assert b"X-Request-Id: req-" in head
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["status"] == "completed"


async def test_metadata_is_not_bottomless(client):
    """Metadata nested beyond what can be walked through is refused, for runs and for saved states."""
    answer = await client.post("/v1/training_clients", {"model_ref": MODEL, "metadata": DEEP})
    assert (answer.status, answer.error["details"]["field"]) == (422, "metadata")
    run = await client.create(MODEL, metadata={"a": [{"b": 1}]})
    answer = await client.post(f"{run}/save_state", {"metadata": DEEP})
    assert (answer.status, answer.error["details"]["field"]) == (422, "metadata")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 100_000, "~nobody-at-all/model"])
@pytest.mark.parametrize("path", ["/v1/training_clients", "/v1/loops/trainers", "/v1/loops/samplers"])
async def test_a_name_that_no_model_can_have_is_not_found(client, path, name):
    """What the system refuses as a path is the name of no model, and is not repeated at length."""
    answer = await client.post(path, {"base_model" if "loops" in path else "model_ref": name})
    assert (answer.status, answer.error["code"]) == (404, "MODEL_NOT_FOUND")
    assert len(answer.body) < 1000


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompts": ["a"] * 17, "num_completions": 1000}, "num_completions"),
        ({"prompts": "a", "stop_sequences": ["x"] * 1025}, "stop_sequences"),
        ({"prompts": {"a": 1}}, "prompts"),
        ({"prompts": "a", "stop_sequences": {"a": 1}}, "stop_sequences"),
    ],
)
async def test_one_sample_is_bounded(client, fields, field):
    """A request that would keep the device from everybody else is refused before it takes its place."""
    run = await client.create(MODEL)
    answer = await client.post(f"{run}/sample", {"max_tokens": 1, **fields})
    assert (answer.status, answer.error["details"]["field"]) == (422, field)


async def test_others_are_served_while_many_prompts_are_encoded(client, monkeypatch):
    """Thousands of prompts in one request give the server's loop away after every one of them."""
    encoded = 0

    def encode(*_: Any, **__: Any) -> list[int]:
        nonlocal encoded
        encoded += 1
        return [1]

    monkeypatch.setattr(Characters, "encode", encode)
    run = await client.create(MODEL)
    many = asyncio.create_task(client.post(f"{run}/sample", {"prompts": ["a"] * 3000, "max_tokens": 1}))
    counts = {0}
    async with asyncio.timeout(20):
        while not many.done():
            await asyncio.sleep(0)
            counts.add(encoded)
    assert many.result().status == 200
    assert counts == set(range(3001))


async def test_a_long_text_that_is_encoded_stops_nobody(client, monkeypatch):
    """While a long prompt is encoded, a short one waits for the tokenizer, and everybody else is served."""
    begun, go_on, encode = threading.Event(), threading.Event(), Characters.encode

    def slow(self: Characters, text: str, **options: Any) -> list[int]:
        if len(text) > 1:
            begun.set()
            assert go_on.wait(20)
        return encode(self, text[:1], **options)

    monkeypatch.setattr(Characters, "encode", slow)
    run = await client.create(MODEL)
    long = asyncio.create_task(client.post(f"{run}/sample", {"prompts": "a" * 100_000, "max_tokens": 1}))
    try:
        assert await asyncio.to_thread(begun.wait, 20)
        short = asyncio.create_task(client.post(f"{run}/sample", {"prompts": "a", "max_tokens": 1}))
        assert (await client.get("/v1/futures")).json == []
        assert not short.done()
    finally:
        go_on.set()
    assert [(await task).status for task in (long, short)] == [200, 200]


FLAGS = {
    "batch.input_ids[0][1]": {"input_ids": [[1, True]]},
    "batch.input_ids[1][0]": {"input_ids": [[1, 2], [False, 2]]},
    "batch.labels[0][0]": {"input_ids": [[1, 2]], "labels": [[True, 2]]},
}


@pytest.mark.parametrize("field", FLAGS)
async def test_true_is_no_token_of_a_batch(client, field):
    """True and False among token ids are refused by place on the TG wire; a mask may be made of them."""
    run = await client.create(MODEL)
    answer = await client.post(f"{run}/forward_backward", {"batch": FLAGS[field]})
    assert (answer.status, answer.error["details"]["field"]) == (422, field)
    masked = {"input_ids": [[1, 2]], "attention_mask": [[True, True]]}
    assert (await client.run(f"{run}/forward_backward", {"batch": masked}))["status"] == "completed"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (datum(1, True), "model_input.chunks[0].tokens[1]"),
        ({**datum(1, 2), "loss_fn_inputs": {"target_tokens": {"data": [2, False], "dtype": "int64"}}},
         "loss_fn_inputs.target_tokens.data[1]"),
        ({**datum(1, 2), "loss_fn_inputs": {"target_tokens": {"data": [True, False], "dtype": "bool"}}},
         "loss_fn_inputs.target_tokens"),
    ],
)  # fmt: skip
async def test_true_is_no_token_of_a_datum(client, data, field):
    """True and False among the tokens and targets of a datum are refused by place on the Loops wire."""
    trainer, _ = await client.trainer(MODEL)
    answer = await client.post(f"{trainer}/forward_backward", {"data": [datum(1, 2), data]})
    assert (answer.status, answer.error["details"]["field"]) == (422, f"data[1].{field}")


async def test_true_is_no_token_of_a_prompt(client):
    """True and False among the tokens of a prompt, or of its stops, are refused by place by the sampler."""
    _, sampler = await client.trainer(MODEL)
    for body, field in (({"prompt": [1, True]}, "prompt[1]"), ({"prompt": [1], "stop": [True]}, "stop")):
        answer = await client.post(f"{sampler}/sample", body)
        assert (answer.status, answer.error["details"]["field"]) == (422, field)
