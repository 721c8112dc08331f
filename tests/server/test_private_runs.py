from __future__ import annotations

import threading
from pathlib import Path

import pytest
from fixtures.server_client import Client, datum

from tg_tinker.privacy import accountant
from tg_tinker.server.engine import TorchEngine
from tg_tinker.wire import digest

TINY = "tg-tinker/tiny"
DP = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "target_epsilon": None, "target_delta": 1e-5}


def batch(*rows: int) -> dict:
    """A batch of rows that differ."""
    return {"batch": {"input_ids": [[row, row + 1, row + 2, row + 3] for row in rows]}}


@pytest.fixture
async def real(serve, tmp_path: Path) -> Client:
    """A client of a server with the real engine."""
    return await serve(engine=TorchEngine(home=tmp_path, threads=1))


async def make(client: Client, **config) -> str:
    """A private TG run on the tiny model."""
    fields = {"seed": 1, "batch_size": 4, "lora_config": {"rank": 4, "dropout": 0.0}, **config}
    fields["dp_config"] = {**DP, **config.get("dp_config", {})}
    return await client.create(TINY, **fields)


async def test_a_private_step_reports_what_it_cost(real):
    """Metrics count examples, clipped ones and ε; the report, the listing and the artifact agree."""
    run = await make(real)
    await real.run(f"{run}/forward_backward", batch(10, 20, 30))
    metrics = (await real.run(f"{run}/optim_step"))["result"]["dp_metrics"]
    assert metrics["noise_applied"] is True
    assert metrics["num_clipped"] == 3
    assert metrics["grad_norm_before_clip"] > metrics["grad_norm_after_clip"] == pytest.approx(0.5, rel=1e-4)
    assert metrics["epsilon_spent"] == metrics["total_epsilon"] > 0
    report = (await real.get(f"{run}/privacy")).json
    assert (report["enabled"], report["steps"], report["expected_batch_size"]) == (True, 1, 4)
    assert report["total_epsilon"] == metrics["total_epsilon"]
    assert (await real.get(run)).json["dp_metrics"]["total_epsilon"] == metrics["total_epsilon"]
    await real.post(f"{run}/save_state")
    (artifact,) = (await real.get("/v1/artifacts")).json
    assert artifact["privacy"]["total_epsilon"] == metrics["total_epsilon"]
    assert artifact["privacy"]["unit"] == "one row of a batch"
    (entry,) = [
        entry for entry in (await real.get("/v1/audit_logs?operation=optim_step")).json if entry["event"] == "ended"
    ]
    assert entry["dp_metrics"]["total_epsilon"] == metrics["total_epsilon"]


async def test_splitting_a_batch_changes_nothing(real):
    """Three examples in one call or in three give the same clipped sum: gradient norms after one step agree."""
    hashes = set()
    for calls in ([(10, 20, 30)], [(10,), (20,), (30,)]):
        run = await make(real, dp_config={"noise_multiplier": 0.0})
        for rows in calls:
            await real.run(f"{run}/forward_backward", batch(*rows))
        norm = (await real.run(f"{run}/optim_step"))["result"]["grad_norm"]
        hashes.add(round(norm, 6))
    assert len(hashes) == 1


async def test_hashes_are_keyed(real):
    """Under privacy no hash is one that an outsider could compute; a passed one is verified and stands behind it."""
    run = await make(real)
    given = digest.batch_hash(batch(10)["batch"])
    done = (await real.run(f"{run}/forward_backward", {**batch(10), "batch_hash": given}))["result"]
    keyed, _, echoed = done["batch_hash"].partition(" ")
    assert keyed.startswith("hmac-sha256:")
    assert echoed == given
    assert done["gradient_hash"].startswith("hmac-sha256:")
    wrong = await real.post(f"{run}/forward_backward", {**batch(11), "batch_hash": given})
    assert wrong.status == 422


async def test_the_budget_is_checked_before_anything_changes(real):
    """Over the budget both the pass and the step are refused, and what was is still there; the rest goes on."""
    run = await make(real, dp_config={"target_epsilon": 6.0})
    await real.run(f"{run}/forward_backward", batch(10))
    spent = (await real.run(f"{run}/optim_step"))["result"]["dp_metrics"]["total_epsilon"]
    while True:
        outcome = await real.run(f"{run}/optim_step")  # a step on no examples is a step, and is charged
        if outcome["status"] == "failed":
            break
        spent = outcome["result"]["dp_metrics"]["total_epsilon"]
    details = outcome["error"]["details"]
    assert outcome["error"]["code"] == "DP_BUDGET_EXCEEDED"
    assert details["current_epsilon"] == spent < 6.0 == details["max_epsilon"] < details["projected_epsilon"]
    refused = await real.run(f"{run}/forward_backward", batch(20))
    assert refused["error"]["code"] == "DP_BUDGET_EXCEEDED"
    report = (await real.get(f"{run}/privacy")).json
    assert report["total_epsilon"] == spent
    for name, body in (("sample", {"prompts": "a", "max_tokens": 2}), ("save_state", {})):
        assert (await real.run(f"{run}/{name}", body))["status"] == "completed"
    assert (await real.run(f"{run}/forward_backward", {**batch(30), "mode": "eval"}))["status"] == "completed"


async def test_a_step_behind_a_refused_pass_says_that_the_budget_is_spent(real):
    """Submitted together, pass and step both fail by the budget: who waits for the step alone is told why, too."""
    run = await make(real, dp_config={"target_epsilon": 6.0})
    await real.run(f"{run}/forward_backward", batch(10))
    spent = (await real.run(f"{run}/optim_step"))["result"]["dp_metrics"]["total_epsilon"]
    futures = [await real.submit(f"{run}/forward_backward", batch(20)), await real.submit(f"{run}/optim_step", {})]
    for future in reversed(futures):
        error = (await real.result(future))["error"]
        assert (error["code"], error["details"]["current_epsilon"]) == ("DP_BUDGET_EXCEEDED", spent)
    assert (await real.get(f"{run}/privacy")).json["total_epsilon"] == spent


async def test_the_ledger_is_never_rolled_back(real):
    """Loading an older state, and starting a new client from it, keep every release that was made by then."""
    run = await make(real)
    saved = []
    for row in (10, 20, 30):
        await real.run(f"{run}/forward_backward", batch(row))
        await real.run(f"{run}/optim_step")
        saved.append((await real.post(f"{run}/save_state")).json["artifact_id"])
    spent = (await real.get(f"{run}/privacy")).json["total_epsilon"]
    loaded = (await real.post(f"{run}/load_state", {"artifact_id": saved[0]})).json
    assert loaded["step"] == 1
    assert (await real.get(f"{run}/privacy")).json["total_epsilon"] == spent
    heir = await make(real, checkpoint_id=saved[1])
    assert (await real.get(f"{heir}/privacy")).json["steps"] == 3
    plain = await real.create(TINY, lora_config={"rank": 4, "dropout": 0.0}, checkpoint_id=saved[1])
    carried = (await real.post(f"{plain}/save_state")).json["artifact_id"]
    grandchild = await make(real, checkpoint_id=carried)
    assert (await real.get(f"{grandchild}/privacy")).json["steps"] == 3


async def test_a_private_run_resumes_exactly_in_itself_alone(real):
    """Loaded into its own run a step repeats itself to the bit; elsewhere the noise differs, and it says so."""
    run = await make(real)
    saved = (await real.post(f"{run}/save_state")).json["artifact_id"]
    others = {
        "noise of its own": await make(real),
        "configured differently": await make(real, dp_config={"noise_multiplier": 2.0}),
        "the other has not": await real.create(TINY, seed=1, lora_config={"rank": 4, "dropout": 0.0}),
    }

    async def step(path: str) -> float:
        await real.run(f"{path}/forward_backward", batch(10))
        return (await real.run(f"{path}/optim_step"))["result"]["grad_norm"]

    first = await step(run)
    assert (await real.post(f"{run}/load_state", {"artifact_id": saved})).json["exact"] is True
    assert await step(run) == first
    for reason, other in others.items():
        loaded = (await real.post(f"{other}/load_state", {"artifact_id": saved})).json
        assert (loaded["exact"], len(loaded["reasons"])) == (False, 1)
        assert reason in loaded["reasons"][0]
        assert await step(other) != first


async def test_the_ledger_outlives_the_server(serve, tmp_path):
    """After a restart a client made from a checkpoint has spent what its run had, also after the checkpoint."""
    engine = TorchEngine(home=tmp_path, threads=1)
    first = await serve(engine=engine)
    run = await make(first)
    for row in (10, 20):
        await first.run(f"{run}/forward_backward", batch(row))
        await first.run(f"{run}/optim_step")
    saved = (await first.post(f"{run}/save_state")).json["artifact_id"]
    spent = (await first.run(f"{run}/optim_step"))["result"]["dp_metrics"]["total_epsilon"]
    await first.server.close()
    second = await serve(engine=engine)
    heir = await make(second, checkpoint_id=saved)
    report = (await second.get(f"{heir}/privacy")).json
    assert (report["steps"], report["total_epsilon"]) == (3, spent)
    metrics = (await second.run(f"{heir}/optim_step"))["result"]["dp_metrics"]
    assert metrics["total_epsilon"] == pytest.approx(spent + metrics["epsilon_spent"])
    assert metrics["epsilon_spent"] > 0
    limited = await make(second, checkpoint_id=saved, dp_config={"target_epsilon": spent})
    assert (await second.run(f"{limited}/optim_step"))["error"]["code"] == "DP_BUDGET_EXCEEDED"


async def test_a_retried_step_is_released_once(serve, tmp_path):
    """A step that is sent again under its key, at once or to the next server, is the same step: one release, one ε."""
    first = await serve(engine=TorchEngine(home=tmp_path, threads=1))
    run = await make(first)
    await first.run(f"{run}/forward_backward", batch(10, 20))
    futures = [await first.submit(f"{run}/optim_step", Idempotency_Key="once") for _ in range(3)]
    results = [(await first.result(future))["result"] for future in futures]
    assert (len(set(futures)), results) == (1, [results[0]] * 3)
    report = (await first.get(f"{run}/privacy")).json
    assert (report["steps"], report["total_epsilon"]) == (1, results[0]["dp_metrics"]["total_epsilon"])
    assert (await first.get(run)).json["step"] == 1
    releases = [path.read_bytes().count(b"\n") for path in (tmp_path / "ledgers").iterdir()]
    await first.server.close()
    second = await serve(engine=TorchEngine(home=tmp_path, threads=1))
    again = await second.post(f"{run}/optim_step", Prefer="respond-async", Idempotency_Key="once")
    assert (again.status, again.error["code"]) == (410, "SERVER_RESTARTED")  # the run ended with its server
    assert (await second.result(futures[0]))["result"] == results[0]
    assert [path.read_bytes().count(b"\n") for path in (tmp_path / "ledgers").iterdir()] == releases == [1]


async def test_a_run_without_privacy_launders_nothing(real):
    """Steps without privacy on private weights have no bound: a private run that goes on from there says so."""
    run = await make(real)
    await real.run(f"{run}/forward_backward", batch(10))
    await real.run(f"{run}/optim_step")
    saved = (await real.post(f"{run}/save_state")).json["artifact_id"]
    plain = await real.create(TINY, lora_config={"rank": 4, "dropout": 0.0}, checkpoint_id=saved)
    assert (await real.run(f"{plain}/optim_step"))["status"] == "failed"  # without gradients: not a step
    untouched = (await real.post(f"{plain}/save_state")).json["artifact_id"]
    await real.run(f"{plain}/forward_backward", batch(20))
    await real.run(f"{plain}/optim_step")
    carried = (await real.post(f"{plain}/save_state")).json["artifact_id"]
    bounded = await make(real, checkpoint_id=untouched)
    assert (await real.get(f"{bounded}/privacy")).json["epsilon_is_infinite"] is False
    heir = await make(real, checkpoint_id=carried)
    report = (await real.get(f"{heir}/privacy")).json
    assert (report["epsilon_is_infinite"], report["total_epsilon"], report["steps"]) == (True, None, 2)
    limited = await make(real, checkpoint_id=carried, dp_config={"target_epsilon": 1e6})
    refused = await real.run(f"{limited}/forward_backward", batch(30))
    assert refused["error"]["code"] == "DP_BUDGET_EXCEEDED"
    assert refused["error"]["details"]["current_epsilon"] is None


async def test_accounting_never_holds_the_device_thread(real, monkeypatch):
    """What takes long to account for is computed on other threads: other runs and samples go on meanwhile."""
    threads: list[str] = []
    compute = accountant._epsilon

    def noted(*arguments):
        threads.append(threading.current_thread().name)
        return compute(*arguments)

    monkeypatch.setattr(accountant, "_epsilon", noted)
    rate = 0.137  # no other test's, so that nothing of it is in the cache
    config = {"accountant_type": "prv", "sample_rate": rate, "target_epsilon": 8.0}
    run = await make(real, dp_config=config)
    totals = []
    for row in (10, 20):
        await real.run(f"{run}/forward_backward", batch(row))
        totals.append((await real.run(f"{run}/optim_step"))["result"]["dp_metrics"]["total_epsilon"])
    saved = (await real.post(f"{run}/save_state")).json["artifact_id"]
    assert (await real.get(f"{run}/privacy")).json["total_epsilon"] == totals[1] > totals[0] > 0
    heir = await make(real, checkpoint_id=saved, dp_config={**config, "sample_rate": rate + 0.01})
    await real.run(f"{heir}/optim_step")
    await real.run(f"{heir}/load_state", {"artifact_id": saved})
    assert (await real.get(f"{heir}/privacy")).json["total_epsilon"] > totals[1]
    assert "tg-tinker-device" not in threads
    assert any(name.startswith("tg-tinker-offline") for name in threads)


async def test_a_step_whose_learning_rate_cannot_be_computed_costs_nothing(real):
    """On the wire as well such a step is refused with ε, step and gradient as they were, and the run stays active."""
    optimizer = {"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1e308}}
    run = await make(real, optimizer=optimizer, max_steps=9)
    await real.run(f"{run}/optim_step")  # the first step's learning rate is that of the beginning
    gathered = (await real.run(f"{run}/forward_backward", batch(10)))["result"]["gradient_hash"]
    before = [(await real.get(path)).json for path in (run, f"{run}/privacy")]
    assert (await real.run(f"{run}/optim_step"))["status"] == "failed"
    assert [(await real.get(path)).json for path in (run, f"{run}/privacy")] == before
    assert before[0]["status"] == "ready"
    nothing = {**batch(20), "mode": "eval"}
    assert (await real.run(f"{run}/forward_backward", nothing))["result"]["gradient_hash"] == gathered


async def test_an_example_enters_a_step_once(real):
    """The same row twice within a step is refused by place; in the next step it is welcome."""
    run = await make(real)
    await real.run(f"{run}/forward_backward", batch(10, 20))
    outcome = await real.run(f"{run}/forward_backward", batch(30, 10))
    assert outcome["error"]["details"]["field"] == "batch[1]"
    assert (await real.run(f"{run}/optim_step"))["result"]["dp_metrics"]["num_clipped"] == 2
    assert (await real.run(f"{run}/forward_backward", batch(10)))["status"] == "completed"


async def test_a_failed_load_forgets_no_example_of_the_gradient(real):
    """A load that is refused drops the gathered gradient with the list of its examples: none can be in it twice."""
    other = await make(real, lora_config={"rank": 8, "dropout": 0.0})
    foreign = (await real.post(f"{other}/save_state")).json["artifact_id"]
    run = await make(real)
    first = (await real.run(f"{run}/forward_backward", batch(10)))["result"]["gradient_hash"]
    assert (await real.run(f"{run}/load_state", {"artifact_id": foreign}))["status"] == "failed"
    again = await real.run(f"{run}/forward_backward", batch(10))
    assert again["result"]["gradient_hash"] == first


async def test_a_step_without_noise_is_infinite_or_refused(real):
    """apply_dp_noise=False is refused where there is a target, and makes ε infinite for good where there is none."""
    bounded = await make(real, dp_config={"target_epsilon": 8.0})
    await real.run(f"{bounded}/forward_backward", batch(10))
    outcome = await real.run(f"{bounded}/optim_step", {"apply_dp_noise": False})
    assert outcome["error"]["code"] == "DP_BUDGET_EXCEEDED"
    assert outcome["error"]["details"]["projected_epsilon"] is None
    free = await make(real)
    await real.run(f"{free}/forward_backward", batch(10))
    metrics = (await real.run(f"{free}/optim_step", {"apply_dp_noise": False}))["result"]["dp_metrics"]
    assert (metrics["noise_applied"], metrics["total_epsilon"], metrics["epsilon_is_infinite"]) == (False, None, True)


async def test_privacy_on_the_loops_surface(real):
    """A Loops run with dp_config is private by datum; without a public batch size it is refused, and so is dpo."""
    refused = await real.post("/v1/loops/trainers", {"base_model": TINY, "dp_config": DP})
    assert refused.error["details"]["field"] == "dp_config.expected_batch_size"
    trainer, _ = await real.trainer(TINY, dp_config={**DP, "expected_batch_size": 2})
    await real.operate(trainer, "forward_backward", {"data": [datum(1, 2, 3), datum(4, 5)]})
    metrics = (await real.operate(trainer, "optim_step", {"adam_params": {}}))["result"]["metrics"]
    assert metrics["epsilon"] == metrics["epsilon_spent"] > 0
    tensors = {"target_tokens": {"data": [2, 3], "dtype": "int64"}, "weights": {"data": [1, 1]},
               "ref_logprobs": {"data": [-1.0, -1.0]}}  # fmt: skip
    pair = [{"model_input": datum(row, 2)["model_input"], "loss_fn_inputs": tensors} for row in (1, 2)]
    outcome = await real.operate(trainer, "forward_backward", {"data": pair, "loss_fn": "dpo"})
    assert outcome["details"]["field"] == "loss_fn"
