from __future__ import annotations

import asyncio

import pytest
from fixtures.fake_engine import MODEL
from fixtures.server_client import OTHER_KEY, datum

PASS = {"data": [datum(1, 2, 3), datum(4, 5)], "loss_fn": "cross_entropy", "loss_fn_config": None}
ADAM = {"adam_params": {"learning_rate": 4e-5}}


async def test_the_training_loop_of_the_page(client, engine):
    """Pass, step, checkpoint, publish, sample, restore: each outcome in the shape of the Loops wire."""
    trainer, sampler = await client.trainer(MODEL)
    run_id = trainer.rpartition("/")[2]
    output = (await client.operate(trainer, "forward_backward", PASS))["result"]
    assert output["loss_fn_output_type"] == "logprobs"
    assert output["loss_fn_outputs"][1] == {"logprobs": {"data": [-1.0, -1.0], "dtype": "float32", "shape": [2]}}
    assert output["metrics"]["loss"] == output["loss"] == 1.0
    step = (await client.operate(trainer, "optim_step", ADAM))["result"]["metrics"]
    assert step == {"step": 1.0, "learning_rate": 4e-5, "lr": 4e-5, "grad_norm": 1.0}
    assert (await client.get(f"{trainer}/policy_version")).json == {"policy_version": 1}
    saved = (await client.operate(trainer, "save_state", {"name": "s1", "ttl_seconds": None}))["result"]
    assert saved == {"mode": "local", "path": f"bt://loops:{run_id}/weights/s1"}
    published = (await client.operate(trainer, "save_weights_for_sampler", {"name": "p", "bump_version": True}))[
        "result"
    ]
    assert (published["version"], published["path"]) == (1, f"bt://loops:{run_id}/sampler_weights/p")
    answer = await client.post(f"{sampler}/sample", {"prompt": [5], "n": 2, "max_tokens": 2}, X_Min_Policy_Version="1")
    assert answer.headers["x-trainers-policy-version"] == "1"
    assert [choice["token_ids"] for choice in answer.json["choices"]] == [[7, 8], [7, 8]]
    assert {choice["finish_reason"] for choice in answer.json["choices"]} == {"length"}
    await client.operate(trainer, "forward", PASS)
    await client.operate(trainer, "forward_backward", PASS)
    await client.operate(trainer, "optim_step", ADAM)
    restored = await client.operate(trainer, "load_state_with_optimizer", {"path": saved["path"]})
    assert restored["result"] == {"step": 1}
    assert (await client.get(f"{trainer}/policy_version")).json == {"policy_version": 1}
    fresh = await client.operate(trainer, "init_trainer_server", {"lora_rank": 2, "base_model": MODEL})
    assert fresh["result"] == {"lora_rank": 2, "step": 0}
    assert engine.trainers[-1].adapter.spec.rank == 2
    assert (await client.get(f"{trainer}/policy_version")).json == {"policy_version": 0}


async def test_a_submit_is_known_by_its_key(client, engine):
    """The operation id is the Idempotency-Key; a retry of the submit is the same operation."""
    trainer, _ = await client.trainer(MODEL)
    for _ in range(2):
        answer = await client.post(f"{trainer}/forward_backward", PASS, Idempotency_Key="key-1")
        assert (answer.status, answer.json) == (202, {"operation_id": "key-1", "schema_version": 1})
        assert answer.headers["Location"] == f"{trainer}/operations/key-1"
    done = (await client.get(f"{trainer}/operations/key-1")).json
    assert (done["status"], done["operation_id"]) == ("done", "key-1")
    assert engine.log.count("forward_backward[0]") == 1
    nameless = await client.post(f"{trainer}/forward_backward", PASS)
    assert (await client.get(f"{trainer}/operations/{nameless.json['operation_id']}")).json["status"] == "done"


async def test_old_and_unknown_keys_of_a_body_are_taken(client):
    """Bodies of every generation of the Loops client are understood: unknown keys are ignored."""
    trainer, _ = await client.trainer(MODEL, replicas=1, availability_model="dedicated")
    body = {
        **PASS, "trainer_server_id": "r1", "seq_id": 7, "model": MODEL, "top_k_logprobs": 0, "something": [1],
        "data": [{**datum(1, 2), "routed_experts_ref": None}],
    }  # fmt: skip
    assert (await client.operate(trainer, "forward_backward", body))["status"] == "done"


async def test_a_failure_is_told_as_loops_tells_it(client):
    """A failed operation is 200 with error and error_class; ours adds code and details."""
    trainer, _ = await client.trainer(MODEL)
    outcome = await client.operate(trainer, "optim_step", ADAM)
    assert (outcome["status"], outcome["error_class"]) == ("error", "ValueError")
    assert "no gradient" in outcome["error"]
    assert (outcome["code"], outcome["details"]["field"]) == ("VALIDATION_ERROR", "optim_step")


async def test_a_pending_operation_is_408_after_a_hold(client, engine):
    """A poll is held as long as it asks, then answers 408; a cancel in the queue is 200, after the end 409."""
    trainer, _ = await client.trainer(MODEL)
    engine.gate.clear()
    for key in ("a", "b"):
        await client.post(f"{trainer}/forward_backward", PASS, Idempotency_Key=key)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert (await client.get(f"{trainer}/operations/a?wait=0.2")).status == 408
    assert loop.time() - begun >= 0.2
    assert (await client.post(f"{trainer}/operations/b/cancel")).status == 200
    engine.gate.set()
    assert (await client.get(f"{trainer}/operations/a")).json["status"] == "done"
    assert (await client.post(f"{trainer}/operations/a/cancel")).status == 409
    assert (await client.get(f"{trainer}/operations/b")).json["code"] == "FUTURE_CANCELLED"


async def test_the_version_gate_waits_for_the_publish(client):
    """A sample that insists on a version is held, woken by the publish, and served by it; or told 408."""
    trainer, sampler = await client.trainer(MODEL)
    early = await client.post(f"{sampler}/sample?wait=0.1", {"prompt": [5], "max_tokens": 1}, X_Min_Policy_Version="1")
    assert (early.status, early.error["code"]) == (408, "SAMPLER_NOT_READY")
    waiting = asyncio.create_task(
        client.post(f"{sampler}/sample", {"prompt": [5], "max_tokens": 1}, X_Min_Policy_Version="1")
    )
    told = asyncio.create_task(client.get(f"{sampler}/trainers_policy_version?min=1"))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await client.operate(trainer, "save_weights_for_sampler", {"name": "p"})
    assert (await waiting).headers["x-trainers-policy-version"] == "1"
    assert (await told).json == {"policy_version": 1}


async def test_a_pinned_version_never_changes(client):
    """The exact header is served by that version although newer ones exist; unpinned samples get the newest."""
    trainer, sampler = await client.trainer(MODEL)
    for name in ("first", "second"):
        await client.operate(trainer, "forward_backward", PASS)
        await client.operate(trainer, "optim_step", ADAM)
        await client.operate(trainer, "save_weights_for_sampler", {"name": name})

    async def first_token(**headers: str) -> tuple[int, str]:
        answer = await client.post(f"{sampler}/sample", {"prompt": [10], "max_tokens": 1}, **headers)
        return answer.json["choices"][0]["token_ids"][0], answer.headers["x-trainers-policy-version"]

    assert await first_token() == (13, "2")
    assert await first_token(X_TG_Exact_Policy_Version="1") == (12, "1")
    assert await first_token(X_TG_Exact_Policy_Version="0") == (11, "0")
    path = trainer.replace("/loops/trainers/", "bt://loops:") + "/sampler_weights/first"
    assert await first_token(X_Checkpoint_Path=path, X_Min_Policy_Version="9") == (12, "1")


async def test_a_bumped_version_takes_over_from_a_checkpoint(client):
    """A sample that names a checkpoint and a version has the checkpoint until that version or a newer is bumped."""
    trainer, sampler = await client.trainer(MODEL)
    path = trainer.replace("/loops/trainers/", "bt://loops:") + "/sampler_weights/first"
    served = []
    for name, bump in (("first", False), ("staged", False), ("bumped", True)):
        await client.operate(trainer, "forward_backward", PASS)
        await client.operate(trainer, "optim_step", ADAM)
        await client.operate(trainer, "save_weights_for_sampler", {"name": name, "bump_version": bump})
        said = {"X_Checkpoint_Path": path, "X_Min_Policy_Version": "1"}
        answer = await client.post(f"{sampler}/sample", {"prompt": [10], "max_tokens": 1}, **said)
        served.append(answer.headers["x-trainers-policy-version"])
    assert served == ["1", "1", "3"]
    answer = await client.post(f"{sampler}/sample", {"prompt": [10], "max_tokens": 1}, X_Checkpoint_Path=path)
    assert answer.headers["x-trainers-policy-version"] == "1"


async def test_samplers_of_every_kind(client):
    """A run's sampler, one of a base model, one of a checkpoint; exactly one of the three must be named."""
    trainer, _ = await client.trainer(MODEL)
    run_id = trainer.rpartition("/")[2]
    path = (await client.operate(trainer, "save_weights_for_sampler", {"name": "p"}))["result"]["path"]
    for body in ({"base_model": MODEL}, {"model_path": path}, {"run_id": run_id}):
        made = (await client.post("/v1/loops/samplers", body)).json["sampler"]
        status = await client.get(f"/v1/models/{made['model_id']}/deployments/{made['deployment_id']}")
        assert status.json["status"] == "ACTIVE"
        answer = await client.post(f"/loops/samplers/{made['id']}/sample", {"prompt": [1], "max_tokens": 1})
        assert answer.status == 200
        assert (await client.get(f"/loops/samplers/{made['id']}/v1/models")).json["data"][0]["id"] == MODEL
        assert (await client.post(f"/loops/samplers/{made['id']}/wake")).status == 200
    for bad in ({}, {"base_model": MODEL, "run_id": run_id}):
        assert (await client.post("/v1/loops/samplers", bad)).status == 422
    missing = await client.post("/v1/loops/samplers", {"model_path": f"bt://loops:{run_id}/sampler_weights/none"})
    assert missing.status == 404


async def test_the_control_plane_is_of_the_dedicated_flavour(client):
    """Sessions, runs and deployments have ids; other clients are given whole URLs, ours paths."""
    session = (await client.post("/v1/loops/sessions")).json["session"]["id"]
    run = (await client.post("/v1/loops/trainers", {"base_model": MODEL, "session_id": session})).json["run"]
    assert run["base_url"] == str(client.server.make_url(f"/loops/trainers/{run['id']}"))
    assert (run["session_id"], run["status"], run["lora_rank"]) == (session, {"name": "ACTIVE"}, 32)
    ours = (await client.get(f"/v1/loops/runs/{run['id']}", User_Agent="tg-tinker/0.1")).json["run"]
    assert ours["base_url"] == f"/loops/trainers/{run['id']}"
    deployment = (await client.get(f"/v1/loops/deployments/{run['deployment_id']}")).json["deployment"]
    assert deployment["status"] == {"name": "RUNNING"}
    assert (await client.get("/v1/teams")).json == {"teams": []}
    offered = (await client.get("/v1/loops/capabilities")).json
    assert {"model_name": MODEL, "max_context_length": 512} in offered["supported_models"]
    assert "ppo" in offered["losses"]
    assert len((await client.get("/v1/loops/runs")).json["runs"]) == 1
    assert (await client.get(f"/loops/trainers/{run['id']}/health?base_model=x")).status == 200


async def test_a_run_is_made_together_with_its_sampler(client):
    """POST runs, as older clients make them, names the run's own sampler in its answer."""
    run = (await client.post("/v1/loops/runs", {"base_model": MODEL, "lora_rank": 4})).json["run"]
    alone = (await client.post("/v1/loops/samplers", {"run_id": run["id"]})).json["sampler"]
    assert {**run["sampler"], "created_at": None} == {**alone, "created_at": None}
    await client.operate(f"/loops/trainers/{run['id']}", "save_weights_for_sampler", {"name": "p"})
    body = {"prompt": [1], "max_tokens": 1}
    answer = await client.post(f"/loops/samplers/{run['sampler']['id']}/sample", body, X_Min_Policy_Version="1")
    assert answer.headers["x-trainers-policy-version"] == "1"


async def test_a_run_with_its_sampler_publishes_what_it_saves(client):
    """A state saved by a run that was made together with its sampler is served as the next version."""
    run = (await client.post("/v1/loops/runs", {"base_model": MODEL, "lora_rank": 4})).json["run"]
    await client.operate(f"/loops/trainers/{run['id']}", "save_state", {"name": "s"})
    served = await client.get(f"/loops/samplers/{run['sampler']['id']}/trainers_policy_version")
    assert served.json == {"policy_version": 1}


async def test_a_sample_that_is_tried_again_draws_the_same(client, engine):
    """A retry has the seeds of the first try; other requests have their own, and a seed that is named is kept."""
    _, sampler = await client.trainer(MODEL)
    body = {"prompt": [1], "n": 2, "max_tokens": 1}
    for key in ("a", "a", "b", None, None):
        await client.post(f"{sampler}/sample", body, **({} if key is None else {"Idempotency_Key": key}))
    await client.post(f"{sampler}/sample", {**body, "seed": 7}, Idempotency_Key="a")
    seeds = [request.seed for request in engine.requests]
    pairs = list(zip(seeds[0::2], seeds[1::2], strict=True))
    assert pairs[0] == pairs[1]
    assert len(set(seeds)) == 10
    assert pairs[-1][0] == 7


async def test_a_deactivated_run_is_gone(client, engine):
    """What it still had to do is cancelled, its trainer and its sampler are not found; its checkpoints stay."""
    trainer, sampler = await client.trainer(MODEL)
    run_id = trainer.rpartition("/")[2]
    await client.operate(trainer, "save_state", {"name": "kept"})
    engine.gate.clear()
    for key in ("a", "b"):
        await client.post(f"{trainer}/forward", PASS, Idempotency_Key=key)
    deactivating = asyncio.create_task(client.post(f"/v1/loops/runs/{run_id}/deactivate"))
    assert (await client.get(f"{trainer}/operations/b?wait=20")).json["code"] == "FUTURE_CANCELLED"
    engine.gate.set()
    answer = await deactivating
    assert (answer.status, answer.json) == (200, {"id": run_id, "base_model": MODEL})
    for path in (f"/v1/loops/runs/{run_id}", f"{trainer}/policy_version", f"{sampler}/v1/models"):
        assert (await client.get(path)).status == 404
    assert (await client.post(f"{trainer}/optim_step", ADAM)).status == 422  # a 404 would be tried again for an hour
    assert (await client.post(f"/v1/loops/runs/{run_id}/deactivate")).status == 404
    listed = (await client.get(f"/v1/loops/checkpoints?run_id={run_id}")).json["checkpoints"]
    assert [one["checkpoint_id"] for one in listed] == ["kept"]


async def test_nobody_deactivates_the_run_of_another(client):
    """A run of another tenant is not found, and goes on."""
    trainer, _ = await client.trainer(MODEL)
    answer = await client.as_tenant(OTHER_KEY).post(f"/v1/loops/runs/{trainer.rpartition('/')[2]}/deactivate")
    assert answer.status == 404
    assert (await client.operate(trainer, "forward", PASS))["status"] == "done"


@pytest.mark.parametrize("rank", [0, -1, 513, 1.5, "8"])
async def test_a_rank_is_refused_by_its_name(client, rank):
    """An impossible rank is a 422 that names it, for a new run as for a fresh adapter."""
    trainer, _ = await client.trainer(MODEL)
    for path, body in (("/v1/loops/trainers", {"base_model": MODEL}), (f"{trainer}/init_trainer_server", {})):
        answer = await client.post(path, {**body, "lora_rank": rank})
        assert (answer.status, answer.error["details"]["field"]) == (422, "lora_rank")


async def test_a_run_starts_from_a_saved_state(client):
    """POST trainers with a path gives a run at the saved step; loading a sampler checkpoint is refused."""
    trainer, _ = await client.trainer(MODEL)
    await client.operate(trainer, "forward_backward", PASS)
    await client.operate(trainer, "optim_step", ADAM)
    path = (await client.operate(trainer, "save_state", {"name": "s"}))["result"]["path"]
    resumed, _ = await client.trainer(MODEL, path=path)
    assert (await client.get(f"{resumed}/policy_version")).json == {"policy_version": 1}
    published = (await client.operate(trainer, "save_weights_for_sampler", {"name": "p"}))["result"]["path"]
    outcome = await client.operate(trainer, "load_state", {"path": published})
    assert "serves sampling" in outcome["error"]
    refused = await client.post("/v1/loops/samplers", {"model_path": path})
    assert "does not serve sampling" in refused.error["message"]


async def test_saving_and_loading_keep_their_order(client):
    """A load submitted right behind the save of the same name finds it: it waits until the save is durable."""
    trainer, _ = await client.trainer(MODEL)
    path = trainer.replace("/loops/trainers/", "bt://loops:") + "/weights/s"
    await client.operate(trainer, "forward_backward", PASS)
    await client.operate(trainer, "optim_step", ADAM)
    for key, name, body in (("a", "save_state", {"name": "s"}), ("b", "load_state", {"path": path})):
        assert (await client.post(f"{trainer}/{name}", body, Idempotency_Key=key)).status == 202
    assert (await client.get(f"{trainer}/operations/b")).json["result"] == {"step": 1}


@pytest.mark.parametrize("body", [{"name": "../x"}, {"name": ""}, {"name": "a", "ttl_seconds": 0}, {}])
async def test_checkpoint_names_are_labels(client, body):
    """A name that is no label, a time to live of nothing, no name: 422 at the submit."""
    trainer, _ = await client.trainer(MODEL)
    for name in ("save_state", "save_weights_for_sampler"):
        assert (await client.post(f"{trainer}/{name}", body)).status == 422


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []),
        ("prompt", "text"),
        ("n", 0),
        ("temperature", -1),
        ("max_tokens", -1),
        ("top_p", 2),
        ("stop", [""]),
        ("structured_outputs", {"regex": "a+"}),
        ("include_routed_experts", True),
    ],
)
async def test_bad_samples_are_refused_by_field(client, field, value):
    """Every field of a sample body that is out of range is a 422 that names it."""
    _, sampler = await client.trainer(MODEL)
    answer = await client.post(f"{sampler}/sample", {"prompt": [1], "max_tokens": 1, field: value})
    assert answer.status == 422
    assert answer.error["details"]["field"].startswith(field)


async def test_a_sampling_client_that_leaves_frees_its_slots(client, engine):
    """Closing the connection of a /sample cancels its generations."""
    _, sampler = await client.trainer(MODEL)
    engine.tick_seconds = 0.1
    request = asyncio.create_task(client.post(f"{sampler}/sample", {"prompt": [1], "n": 3, "max_tokens": 400}))
    async with asyncio.timeout(30):
        while not (engine.samplers and len(engine.samplers[0].active) == 3):
            await asyncio.sleep(0.005)
        request.cancel()
        while engine.samplers[0].active:
            await asyncio.sleep(0.005)
    assert len(engine.samplers[0].cancelled) == 3
    await asyncio.gather(request, return_exceptions=True)
