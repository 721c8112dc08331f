from __future__ import annotations

import asyncio

import pytest
from fixtures.fake_engine import MODEL
from fixtures.server_client import BATCH, KEY, datum

from tg_tinker import InvalidRequestError, OperationFailedError, ServiceClient, TrainingConfig
from tg_tinker.server.middleware import ROOMS


async def until(holds, *, seconds: float = 10.0) -> None:
    """Wait until something another thread does has come about."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)


async def test_operations_run_in_the_order_of_their_acceptance(client, engine):
    """Passes, step, sample and save of one run take effect exactly in the order in which they were accepted."""
    run = await client.create(MODEL)
    engine.gate.clear()
    futures = [
        await client.submit(f"{run}/{name}", body)
        for name, body in (
            ("forward_backward", {"batch": BATCH}),
            ("optim_step", {}),
            ("sample", {"prompts": "a", "max_tokens": 1}),
            ("save_state", {}),
            ("forward_backward", {"batch": BATCH}),
            ("optim_step", {}),
        )
    ]
    engine.gate.set()
    outcomes = [await client.result(future) for future in futures]
    assert [outcome["status"] for outcome in outcomes] == ["completed"] * 6
    assert outcomes[2]["result"]["model_step"] == 1
    assert outcomes[3]["result"]["step"] == 1
    steps = [entry for entry in engine.log if entry != "tick"]
    passes = ["forward_backward[0]", "forward_backward[1]"]
    assert steps == [*passes, "optim_step(2)", "snapshot@1", *passes, "optim_step(2)"]


async def test_a_retried_request_is_the_same_operation(client, engine):
    """A reply lost after acceptance never trains twice: the same key gives the same future, executed once."""
    run = await client.create(MODEL)
    first = await client.submit(f"{run}/forward_backward", {"batch": BATCH}, Idempotency_Key="k1")
    assert await client.submit(f"{run}/forward_backward", {"batch": BATCH}, Idempotency_Key="k1") == first
    await client.result(first)
    assert await client.submit(f"{run}/forward_backward", {"batch": BATCH}, Idempotency_Key="k1") == first
    assert engine.log.count("forward_backward[0]") == 1
    other = await client.post(f"{run}/forward_backward", {"batch": {"input_ids": [[9, 9]]}}, Idempotency_Key="k1")
    assert (other.status, other.error["code"]) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert (await client.run(f"{run}/optim_step"))["result"]["step"] == 1


async def test_retries_that_race_are_one_operation(client, engine):
    """Two requests with one key at the same time are accepted once."""
    run = await client.create(MODEL)
    body = {"batch": BATCH}
    futures = await asyncio.gather(
        *(client.submit(f"{run}/forward_backward", body, Idempotency_Key="same") for _ in range(5))
    )
    assert len(set(futures)) == 1
    await client.result(futures[0])
    assert engine.log.count("forward_backward[0]") == 1


async def test_a_creation_key_is_good_for_one_request(client):
    """The key of another creation is refused, on either surface, not answered with that other run."""
    key = {"Idempotency_Key": "c"}
    assert (await client.post("/v1/training_clients", {"model_ref": MODEL}, **key)).status == 201
    other = await client.post("/v1/training_clients", {"model_ref": MODEL, "batch_size": 3}, **key)
    loops = await client.post("/v1/loops/trainers", {"base_model": MODEL}, **key)
    assert [answer.error["code"] for answer in (other, loops)] == ["IDEMPOTENCY_KEY_REUSED"] * 2


async def test_a_retried_creation_makes_one_run(client, engine):
    """Creating a client twice under one key, even at once, gives the same run."""
    engine.load_gate.clear()
    requests = [
        asyncio.create_task(client.post("/v1/training_clients", {"model_ref": MODEL}, Idempotency_Key="c"))
        for _ in "ab"
    ]
    await until(lambda: engine.loads)
    engine.load_gate.set()
    first, second = [(await request).json["training_client_id"] for request in requests]
    assert first == second
    assert len((await client.get("/v1/training_clients")).json) == 1


async def test_runs_share_one_loading_of_a_model(client, engine):
    """Several runs, created at once, load their base model once and sample through one sampler."""
    await asyncio.gather(*(client.create(MODEL) for _ in range(4)))
    assert (engine.loads, len(engine.samplers), len(engine.trainers)) == (1, 1, 4)


async def test_precisions_that_mean_the_same_share_a_model(client, engine):
    """On a CPU "auto" is "fp32", whichever was asked for first; "bf16" is another model."""
    for precision in ("fp32", "auto", "fp32", "bf16"):
        await client.create(MODEL, mixed_precision=precision)
    assert engine.loads == 2


async def test_a_queued_operation_that_is_cancelled_never_runs(client, engine):
    """Cancelling queued work says true and it is not executed; what is done says false."""
    run = await client.create(MODEL)
    engine.gate.clear()
    first = await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    second = await client.submit(f"{run}/forward_backward", {"batch": {"input_ids": [[7, 8]]}})
    assert (await client.post(f"{second}/cancel")).json == {"success": True}
    engine.gate.set()
    await client.result(first)
    outcome = await client.result(second)
    assert (outcome["status"], outcome["error"]["code"]) == ("cancelled", "FUTURE_CANCELLED")
    assert outcome["error"]["details"]["future_id"] == second.rpartition("/")[2]
    assert engine.log.count("forward_backward[0]") == 1
    assert (await client.post(f"{first}/cancel")).json == {"success": False}
    assert (await client.run(f"{run}/optim_step"))["status"] == "completed"


async def test_a_step_is_not_taken_without_a_pass_that_was_cancelled_before_it(client, engine):
    """A step queued behind a pass that is then cancelled is refused, naming it; what is sent afterwards is taken."""
    run = await client.create(MODEL)
    engine.gate.clear()
    first = await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    cancelled = await client.submit(f"{run}/forward_backward", {"batch": {"input_ids": [[7, 8]]}})
    step = await client.submit(f"{run}/optim_step")
    assert (await client.post(f"{cancelled}/cancel")).json == {"success": True}
    engine.gate.set()
    assert (await client.result(first))["status"] == "completed"
    outcome = await client.result(step)
    assert (outcome["status"], outcome["error"]["code"]) == ("failed", "OPERATION_FAILED")
    assert cancelled.rpartition("/")[2] in outcome["error"]["message"]
    assert (await client.run(f"{run}/optim_step"))["status"] == "failed"  # the gradient of the first pass is gone
    await client.run(f"{run}/forward_backward", {"batch": BATCH})
    assert (await client.run(f"{run}/optim_step"))["result"]["step"] == 1


async def test_a_cancelled_pass_spoils_only_the_step_behind_it(client, engine):
    """A step before a cancelled pass is taken, and so is one behind a cancelled evaluation, which has no gradient."""
    run = await client.create(MODEL)
    engine.gate.clear()
    futures = [
        await client.submit(f"{run}/{name}", body)
        for name, body in (
            ("forward_backward", {"batch": BATCH}),
            ("forward_backward", {"batch": BATCH, "mode": "eval"}),
            ("optim_step", {}),
            ("forward_backward", {"batch": BATCH}),
            ("optim_step", {}),
        )
    ]
    for future in (futures[1], futures[3]):
        assert (await client.post(f"{future}/cancel")).json == {"success": True}
    engine.gate.set()
    statuses = [(await client.result(future))["status"] for future in futures]
    assert statuses == ["completed", "cancelled", "completed", "cancelled", "failed"]


async def test_a_load_clears_what_was_cancelled_before_it(client, engine):
    """A pass cancelled in front of a load_state does not spoil the step that follows passes behind the load."""
    run = await client.create(MODEL)
    saved = (await client.post(f"{run}/save_state")).json["artifact_id"]
    engine.gate.clear()
    futures = [
        await client.submit(f"{run}/{name}", body)
        for name, body in (
            ("forward_backward", {"batch": BATCH}),
            ("forward_backward", {"batch": BATCH}),
            ("load_state", {"artifact_id": saved}),
            ("forward_backward", {"batch": BATCH}),
            ("optim_step", {}),
        )
    ]
    assert (await client.post(f"{futures[1]}/cancel")).json == {"success": True}
    engine.gate.set()
    statuses = [(await client.result(future))["status"] for future in futures]
    assert statuses == ["completed", "cancelled", "completed", "completed", "completed"]


async def test_loops_steps_are_not_taken_without_a_cancelled_pass(client, engine):
    """On the Loops surface the step behind a cancelled pass is refused likewise."""
    trainer, _ = await client.trainer(MODEL)
    engine.gate.clear()
    names = ("forward_backward", "forward_backward", "optim_step")
    bodies = ({"data": [datum(1, 2)]}, {"data": [datum(3, 4)]}, {"adam_params": {}})
    ids = [
        (await client.post(f"{trainer}/{name}", body)).json["operation_id"]
        for name, body in zip(names, bodies, strict=True)
    ]
    assert (await client.post(f"{trainer}/operations/{ids[1]}/cancel")).status == 200
    engine.gate.set()
    outcome = (await client.get(f"{trainer}/operations/{ids[2]}?wait=20")).json
    assert (outcome["status"], outcome["code"]) == ("error", "OPERATION_FAILED")
    assert "cancelled before it ran" in outcome["error"]


async def test_a_running_pass_stops_at_the_next_micro_batch(client, engine):
    """Cancelling a pass that runs stops it between micro-batches and fails the step queued behind it."""
    run = await client.create(MODEL)
    engine.gate.clear()
    running = await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    step = await client.submit(f"{run}/optim_step")
    await until(lambda: "forward_backward[0]" in engine.log)
    cancelling = asyncio.create_task(client.post(f"{running}/cancel"))
    tickets = client.server.app[ROOMS].tickets
    await until(lambda: any(ticket.job is not None and ticket.job.stopping for ticket in tickets))
    engine.gate.set()
    assert (await cancelling).json == {"success": True}
    assert (await client.result(running))["status"] == "cancelled"
    assert "forward_backward[1]" not in engine.log
    outcome = await client.result(step)
    assert outcome["error"]["code"] == "OPERATION_FAILED"
    assert running.rpartition("/")[2] in outcome["error"]["message"]


async def test_a_failed_pass_fails_the_step_behind_it_and_nothing_else(client, engine):
    """A step accepted before its client knew of the failure is refused, naming it; the run stays usable."""
    run = await client.create(MODEL)
    engine.gate.clear()
    engine.failures.append(RuntimeError("the device said no"))
    passes = [await client.submit(f"{run}/forward_backward", {"batch": BATCH}) for _ in range(2)]
    step = await client.submit(f"{run}/optim_step")
    engine.gate.set()
    outcome = await client.result(step)
    assert (outcome["status"], outcome["error"]["code"]) == ("failed", "OPERATION_FAILED")
    assert passes[0].rpartition("/")[2] in outcome["error"]["message"]
    assert "the device said no" in outcome["error"]["message"]
    assert (await client.result(passes[0]))["error"]["code"] == "OPERATION_FAILED"
    assert (await client.get(run)).json["status"] == "ready"
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["status"] == "completed"
    assert (await client.run(f"{run}/optim_step"))["result"]["step"] == 1
    assert "optim_step(2)" in engine.log


async def test_who_knows_of_a_failure_may_go_on(client, engine):
    """After the failure of a pass was told, a new pass and a step work at once."""
    run = await client.create(MODEL)
    engine.failures.append(RuntimeError("no"))
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["status"] == "failed"
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["status"] == "completed"
    assert (await client.run(f"{run}/optim_step"))["result"]["step"] == 1


async def test_runs_take_turns_by_micro_batch(client, engine):
    """Two runs with long passes alternate micro-batch by micro-batch."""
    runs = [await client.create(MODEL) for _ in range(2)]
    engine.gate.clear()
    batch = {"batch": {"input_ids": [[1, 2]] * 4}}
    futures = [await client.submit(f"{run}/forward_backward", batch) for run in runs]
    engine.gate.set()
    for future in futures:
        await client.result(future)
    numbers = [int(entry[-2]) for entry in engine.log if entry.startswith("forward_backward")]
    assert numbers == [0, 0, 1, 1, 2, 2, 3, 3]


async def test_sampling_goes_on_between_micro_batches(client, engine):
    """A sample accepted before a long pass finishes in the middle of it: neither waits for the other."""
    run, other = await client.create(MODEL), await client.create(MODEL)
    engine.tick_gate.clear()
    sample = await client.submit(f"{other}/sample", {"prompts": "a", "max_tokens": 3})
    await until(lambda: "tick" in engine.log)
    training = await client.submit(f"{run}/forward_backward", {"batch": {"input_ids": [[1, 2]] * 20}})
    engine.tick_gate.set()
    assert (await client.result(sample))["status"] == "completed"
    assert (await client.result(training))["status"] == "completed"
    between = engine.log[engine.log.index("forward_backward[0]") : engine.log.index("forward_backward[3]")]
    assert "tick" in between


async def test_a_short_sample_beside_a_long_one_finishes_first(client, engine):
    """An 8-token sample that arrives while a 400-token one runs is answered before it."""
    engine.tick_seconds = 0.005
    run = await client.create(MODEL)
    done: list[int] = []

    async def sample(tokens: int) -> None:
        answer = await client.post(f"{run}/sample", {"prompts": "a", "max_tokens": tokens})
        assert answer.json["samples"][0]["num_tokens"] == tokens
        done.append(tokens)

    long = asyncio.create_task(sample(400))
    await until(lambda: client.server.app[ROOMS].tickets.of_tenant("tenant-a"))
    await sample(8)
    await long
    assert done == [8, 400]


async def test_a_full_queue_is_a_503_that_says_when(serve, engine):
    """A tenant with too much waiting gets QUEUE_FULL with Retry-After; another tenant does not."""
    client = await serve(queue_limit=2)
    run = await client.create(MODEL)
    other = await client.as_tenant("other-key").create(MODEL)
    engine.gate.clear()
    for _ in range(2):
        await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    answer = await client.post(f"{run}/forward_backward", {"batch": BATCH})
    assert (answer.status, answer.error["code"]) == (503, "QUEUE_FULL")
    assert int(answer.headers["Retry-After"]) >= 1
    await client.as_tenant("other-key").submit(f"{other}/optim_step")
    engine.gate.set()
    await until(lambda: all(ticket.done for ticket in client.server.app[ROOMS].tickets))
    await client.submit(f"{run}/forward_backward", {"batch": BATCH})


async def test_deleting_a_client_cancels_what_it_still_had_to_do(client, engine):
    """A deleted run is gone, its queue is cancelled, and other runs go on."""
    run, other = await client.create(MODEL), await client.create(MODEL)
    engine.gate.clear()
    running = await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    queued = await client.submit(f"{run}/optim_step")
    deleting = asyncio.create_task(client.call("DELETE", run))
    tickets = client.server.app[ROOMS].tickets
    await until(lambda: any(ticket.job is not None and ticket.job.stopping for ticket in tickets))
    engine.gate.set()
    assert (await deleting).status == 200
    assert [(await client.result(future))["status"] for future in (running, queued)] == ["cancelled"] * 2
    assert (await client.get(run)).status == 404
    assert (await client.run(f"{other}/forward_backward", {"batch": BATCH}))["status"] == "completed"


async def test_a_client_knows_the_run_s_status_from_a_failure(client, engine):
    """A step that breaks in the middle, and what is refused after it, tell the client; a load makes it active again."""
    url = str(client.server.make_url("")).rstrip("/")
    async with ServiceClient(KEY, url) as service:
        tc = await service.create_training_client_async(TrainingConfig(model_ref=MODEL, max_steps=2))
        other = await service.get_training_client_async(tc.id)
        saved = await tc.save_state_async()
        trainer = engine.trainers[0]
        trainer.optim_step, step = fail, trainer.optim_step
        tc.forward_backward(BATCH)
        with pytest.raises(OperationFailedError, match="broke in the middle") as caught:
            await tc.optim_step()
        assert (caught.value.code, tc.status, other.status) == ("RUN_FAILED", "failed", "active")
        with pytest.raises(InvalidRequestError):
            await other.forward_backward(BATCH)
        assert other.status == "failed" == (await other.refresh_async()).status
        trainer.optim_step = step
        await tc.load_state_async(saved.artifact_id)
        assert tc.status == "active"
        for _ in range(2):
            tc.forward_backward(BATCH)
            await tc.optim_step()
        assert (tc.status, other.status) == ("completed", "failed")
        with pytest.raises(InvalidRequestError):
            await other.optim_step()
        assert other.status == "completed"


def fail(_: object) -> None:
    """Break as no error of ours would."""
    raise RuntimeError("half of the moments")
