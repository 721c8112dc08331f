from __future__ import annotations

import asyncio
from datetime import datetime

import pytest
from fixtures.fake_engine import MODEL, FakeSampler
from fixtures.server_client import BATCH, KEY

from tg_tinker import InvalidRequestError, ServiceClient
from tg_tinker.server.middleware import ROOMS
from tg_tinker.wire import digest, frames


async def test_a_client_is_created_listed_shown_and_limited(client):
    """Creation answers 201 with the whole of it; lists filter by status and limit."""
    answer = await client.post("/v1/training_clients", {"model_ref": MODEL, "max_steps": 1, "metadata": {"a": 1}})
    made = answer.json
    assert answer.status == 201
    assert (made["tenant_id"], made["model_ref"], made["status"], made["step"]) == ("tenant-a", MODEL, "ready", 0)
    assert datetime.fromisoformat(made["created_at"]).tzinfo is not None
    assert made["config"]["metadata"] == {"a": 1}
    assert made["config"]["seed"] >= 0
    await client.create(MODEL)
    listed = (await client.get("/v1/training_clients")).json
    assert [one["config"]["max_steps"] for one in listed] == [None, 1]
    assert len((await client.get("/v1/training_clients?limit=1")).json) == 1
    assert (await client.get("/v1/training_clients?status=completed")).json == []
    for word in ("ready", "active"):  # the wire's, and the client's
        assert len((await client.get(f"/v1/training_clients?status={word}")).json) == 2
    refused = await client.get("/v1/training_clients?status=busy")
    assert (refused.status, refused.error["details"]["field"]) == (422, "status")


async def test_every_result_field_is_there(client):
    """A pass reports loss, both hashes, tokens and time; a step reports norm, rate, number and time."""
    run = await client.create(MODEL)
    done = (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["result"]
    assert done["batch_hash"] == digest.batch_hash(BATCH)
    assert done["gradient_hash"] == f"sha256:{2:064x}"
    assert (done["loss"], done["num_tokens"]) == (1.0, 6)
    assert done["latency_ms"] > 0
    step = (await client.run(f"{run}/optim_step"))["result"]
    assert (step["grad_norm"], step["learning_rate"], step["step"], step["dp_metrics"]) == (1.0, 1e-4, 1, None)
    assert (await client.get(run)).json["step"] == 1


async def test_a_batch_hash_is_verified_and_a_label_echoed(client):
    """A hash of our scheme must be the batch's; any other string is the caller's own label."""
    run = await client.create(MODEL)
    good = digest.batch_hash(BATCH)
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH, "batch_hash": good}))["status"] == "completed"
    label = await client.run(f"{run}/forward_backward", {"batch": BATCH, "batch_hash": "epoch-1"})
    assert label["result"]["batch_hash"] == "epoch-1"
    wrong = await client.post(f"{run}/forward_backward", {"batch": BATCH, "batch_hash": "sha256:" + "0" * 64})
    assert (wrong.status, wrong.error["details"]["field"]) == (422, "batch_hash")


async def test_eval_touches_no_gradient_and_takes_no_step(client, engine):
    """In eval mode the loss is computed, the accumulator keeps its hash, and a step is an error."""
    run = await client.create(MODEL)
    trained = (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["result"]
    evaluated = (await client.run(f"{run}/forward_backward", {"batch": BATCH, "mode": "eval"}))["result"]
    assert evaluated["gradient_hash"] == trained["gradient_hash"]
    assert "forward[1]" in engine.log
    outcome = await client.run(f"{run}/optim_step", {"mode": "eval"})
    assert outcome["error"]["details"]["field"] == "mode"
    assert (await client.run(f"{run}/optim_step"))["result"]["step"] == 1


async def test_max_steps_completes_the_run(client):
    """After max_steps the status is "completed", training is refused, evaluating, sampling and saving go on."""
    run = await client.create(MODEL, max_steps=1)
    await client.run(f"{run}/forward_backward", {"batch": BATCH})
    await client.run(f"{run}/optim_step")
    assert (await client.get(run)).json["status"] == "completed"
    for name, body in (("forward_backward", {"batch": BATCH}), ("optim_step", {})):
        assert (await client.run(f"{run}/{name}", body))["error"]["code"] == "RUN_COMPLETED"
    for name, body in (("sample", {"prompts": "a", "max_tokens": 1}), ("save_state", {})):
        assert (await client.run(f"{run}/{name}", body))["status"] == "completed"
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH, "mode": "eval"}))["status"] == "completed"


async def test_sample_passes_every_argument_on(client, engine):
    """Each argument reaches the sampler; the first completion has the request's own seed, each other one its own."""
    run = await client.create(MODEL)
    asked = {
        "prompts": ["ab", "c"], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 5,
        "stop_sequences": ["x"], "num_completions": 2, "repetition_penalty": 1.5, "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
    }  # fmt: skip
    result = (await client.run(f"{run}/sample", asked))["result"]
    assert [sample["prompt"] for sample in result["samples"]] == ["ab", "ab", "c", "c"]
    assert result["total_tokens"] == 8
    assert [request.prompt for request in engine.requests] == [(97, 98), (97, 98), (99,), (99,)]
    request = engine.requests[0]
    assert (request.temperature, request.top_p, request.top_k, request.stop) == (0.5, 0.9, 7, ("x",))
    assert (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) == (1.5, 0.25, -0.5)
    assert request.seed == 5
    assert len({request.seed for request in engine.requests}) == 4


async def test_sample_answers_at_once_or_when_done(client):
    """Without a preference sample answers 200 with the result; ``Prefer: respond-async`` gets 202 and a future."""
    run = await client.create(MODEL)
    direct = await client.post(f"{run}/sample", {"prompts": "a", "max_tokens": 2})
    assert (direct.status, direct.json["samples"][0]["completion"]) == (200, "bc")
    later = await client.post(f"{run}/sample", {"prompts": "a", "max_tokens": 2}, Prefer="respond-async")
    assert (later.status, later.json["operation"], later.json["status"]) == (202, "sample", "pending")


async def test_a_stream_concatenates_to_the_sample(client):
    """The chunks of sample_stream add up to sample's completion; the last one alone has a finish reason."""
    run = await client.create(MODEL)
    answer = await client.post(f"{run}/sample_stream", {"prompts": "a", "max_tokens": 5})
    assert answer.headers["Content-Type"] == frames.CONTENT_TYPE
    *items, end = frames.FrameReader().feed(answer.body)
    assert end == {"end": True}
    chunks = [item["item"] for item in items]
    assert "".join(chunk["text"] for chunk in chunks) == "bcdef"
    assert [token for chunk in chunks for token in chunk["token_ids"]] == [98, 99, 100, 101, 102]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert (await client.post(f"{run}/sample_stream", {"prompts": ["a", "b"]})).status == 422


@pytest.mark.parametrize("path", ["sample", "sample_stream"])
async def test_a_prompt_that_is_too_long_is_refused_by_its_place(client, path):
    """The model's length is known when the request comes: the answer is a 422 that says which prompt it is."""
    run = await client.create(MODEL)
    answer = await client.post(f"{run}/{path}", {"prompts": "a" * 600, "max_tokens": 5})
    assert (answer.status, answer.error["details"]["field"]) == (422, "prompts[0]")


async def test_a_stream_that_fails_ends_with_the_error(client, monkeypatch):
    """What the sampler refuses ends the stream with a typed error frame."""

    def refuse(*_):
        raise InvalidRequestError("prompt: no", field="prompt")

    run = await client.create(MODEL)
    monkeypatch.setattr(FakeSampler, "submit", refuse)
    answer = await client.post(f"{run}/sample_stream", {"prompts": "a", "max_tokens": 5})
    (frame,) = frames.FrameReader().feed(answer.body)
    assert frame["error"]["details"]["field"] == "prompt"


@pytest.mark.parametrize("path", ["sample", "sample_stream"])
async def test_a_client_that_leaves_stops_the_generation(client, engine, path):
    """Closing the connection frees the slot and ends the operation as cancelled."""
    run = await client.create(MODEL)
    engine.tick_seconds = 0.1
    url, body = client.server.make_url(f"{run}/{path}"), {"prompts": "a", "max_tokens": 400}
    request = asyncio.create_task(
        client.session.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"}).__aenter__()
    )
    async with asyncio.timeout(30):
        while not (engine.samplers and engine.samplers[0].active):
            await asyncio.sleep(0.005)
        if path == "sample_stream":
            (await request).close()
        else:
            request.cancel()
        ticket = client.server.app[ROOMS].tickets.of_tenant("tenant-a")[0]
        await ticket.wait(None)
    assert ticket.status == "cancelled"
    assert engine.samplers[0].cancelled
    assert not engine.samplers[0].busy
    await asyncio.gather(request, return_exceptions=True)


async def test_a_saved_state_comes_back(client, engine):
    """save_state resolves when the artifact is durable; load_state restores step and metadata in its place."""
    run = await client.create(MODEL)
    await client.run(f"{run}/forward_backward", {"batch": BATCH})
    await client.run(f"{run}/optim_step")
    saved = (await client.post(f"{run}/save_state", {"metadata": {"epoch": 5}})).json
    assert (saved["metadata"], saved["step"], saved["encryption"]["algorithm"]) == ({"epoch": 5}, 1, "AES-256-GCM")
    assert saved["size_bytes"] > 0
    await client.run(f"{run}/forward_backward", {"batch": BATCH})
    await client.run(f"{run}/optim_step")
    loaded = (await client.post(f"{run}/load_state", {"artifact_id": saved["artifact_id"]})).json
    assert (loaded["step"], loaded["metadata"], loaded["exact"]) == (1, {"epoch": 5}, True)
    assert loaded["timestamp"] == saved["timestamp"]
    assert (await client.get(run)).json["step"] == 1
    fresh = await client.create(MODEL, checkpoint_id=saved["artifact_id"])
    assert (await client.get(fresh)).json["step"] == 1


async def test_a_state_is_loaded_only_where_it_fits(client):
    """A state of another base model, an unknown one and a published adapter are refused; the run keeps its step."""
    run = await client.create(MODEL)
    other = await client.create(MODEL, mixed_precision="bf16")
    saved = (await client.post(f"{other}/save_state")).json["artifact_id"]
    outcome = await client.run(f"{run}/load_state", {"artifact_id": saved})
    assert outcome["error"]["details"]["field"] == "artifact_id"
    missing = await client.post(f"{run}/load_state", {"artifact_id": "art-" + "0" * 32})
    assert (missing.status, missing.error["code"]) == (404, "ARTIFACT_NOT_FOUND")
    refused = await client.post("/v1/training_clients", {"model_ref": MODEL, "checkpoint_id": "nope"})
    assert refused.status == 404
    assert len((await client.get("/v1/training_clients")).json) == 2


async def test_artifacts_are_listed_pulled_and_deleted(client):
    """An artifact is one self-describing string of bytes, until it is deleted."""
    run = await client.create(MODEL)
    artifact = (await client.post(f"{run}/save_state")).json["artifact_id"]
    (listed,) = (await client.get("/v1/artifacts")).json
    assert (listed["artifact_id"], listed["kind"], listed["metadata"]) == (artifact, "tg_state", {})
    pulled = await client.get(f"/v1/artifacts/{artifact}/content")
    assert artifact in pulled.headers["Content-Disposition"]
    assert pulled.headers["X-Encryption-Algorithm"] == "AES-256-GCM"
    assert pulled.headers["X-Encryption-Key-Id"] == listed["encryption"]["key_id"]
    assert len(pulled.body) >= listed["size_bytes"]
    assert (await client.call("DELETE", f"/v1/artifacts/{artifact}")).status == 200
    assert (await client.get(f"/v1/artifacts/{artifact}/content")).status == 404


async def test_the_tokenizer_is_served(client):
    """A client without the model gets the tokenizer's files."""
    answer = await client.get(f"/v1/tokenizer?model={MODEL}")
    assert answer.json == {"model": MODEL, "files": {"tokenizer.json": "{}"}}
    assert (await client.get("/v1/tokenizer")).status == 422


async def test_polls_hold_exactly_as_long_as_they_are_told(client, engine):
    """A poll with ``wait`` answers when the operation ends, or "running" when its time is up."""
    run = await client.create(MODEL)
    engine.gate.clear()
    future = await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert (await client.result(future, wait=0.2))["status"] in {"pending", "running"}
    assert loop.time() - begun >= 0.2
    assert (await client.result(future, wait=0))["result"] is None
    poll = asyncio.create_task(client.result(future, wait=20))
    await asyncio.sleep(0.05)
    engine.gate.set()
    assert (await poll)["status"] == "completed"
    assert (await client.get(future)).json["started_at"] is not None
    assert (await client.get(f"{future}/result?wait=-1")).status == 422


async def test_samples_of_one_step_share_one_copy_of_the_weights(client, engine):
    """However many samples are asked for between two steps, the adapter is copied once."""
    run = await client.create(MODEL)
    asked = {"prompts": "a", "max_tokens": 2}
    await asyncio.gather(*(client.run(f"{run}/sample", asked) for _ in range(10)))
    assert engine.log.count("snapshot@0") == 1
    await client.run(f"{run}/forward_backward", {"batch": BATCH})
    await client.run(f"{run}/optim_step")
    assert (await client.run(f"{run}/sample", asked))["result"]["samples"][0]["completion"] == "cd"
    assert len({id(request.adapter) for request in engine.requests}) == 2


async def test_a_sample_that_runs_can_be_cancelled(client, engine):
    """Cancelling a sample whose tokens are being made says true and frees its slots."""
    run = await client.create(MODEL)
    engine.tick_seconds = 0.1
    future = await client.submit(f"{run}/sample", {"prompts": "a", "max_tokens": 400, "num_completions": 2})
    async with asyncio.timeout(30):
        while not (engine.samplers and len(engine.samplers[0].active) == 2):
            await asyncio.sleep(0.005)
    assert (await client.post(f"{future}/cancel")).json == {"success": True}
    assert (await client.result(future))["status"] == "cancelled"
    assert not engine.samplers[0].busy


async def test_a_sample_that_is_waited_for_and_cancelled_answers_409(client, engine):
    """Who waits for the result itself is told of the cancellation by status and code."""
    run = await client.create(MODEL)
    engine.tick_seconds = 0.1
    waiting = asyncio.create_task(client.post(f"{run}/sample", {"prompts": "a", "max_tokens": 400}))
    async with asyncio.timeout(30):
        while not (futures := (await client.get("/v1/futures?status=running")).json):
            await asyncio.sleep(0.01)
    await client.post(f"/v1/futures/{futures[0]['future_id']}/cancel")
    answer = await waiting
    assert (answer.status, answer.error["code"]) == (409, "FUTURE_CANCELLED")


async def test_the_wire_is_below_api_as_well(client):
    """Both prefixes lead to the same runs and futures, for plain HTTP and for our own client."""
    run = await client.create(MODEL)
    future = await client.submit(f"/api{run}/forward_backward", {"batch": BATCH})
    assert (await client.result(future))["status"] == (await client.result(f"/api{future}"))["status"] == "completed"
    async with ServiceClient(KEY, str(client.server.make_url("/api"))) as service:
        tc = await service.get_training_client_async(run.rpartition("/")[2])
        assert (await tc.sample_async("a", 2, seed=1)).samples[0].num_tokens == 2
        assert [chunk async for chunk in tc.sample_stream_async("a", 2, seed=1)]
        assert (await service.verify_audit_log_async()).ok


async def test_a_stream_that_is_asked_for_again_streams_again(client):
    """A stream cannot be replayed: the same key gives a stream of its own."""
    run = await client.create(MODEL)
    for _ in range(2):
        answer = await client.post(f"{run}/sample_stream", {"prompts": "a", "max_tokens": 2}, Idempotency_Key="s")
        *items, end = frames.FrameReader().feed(answer.body)
        assert "".join(item["item"]["text"] for item in items) == "bc"
        assert end == {"end": True}
