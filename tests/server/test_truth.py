from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
from fixtures.server_client import Client, datum

from tg_tinker.server.engine import TorchEngine
from tg_tinker.server.middleware import ROOMS
from tg_tinker.wire import frames

TINY = "tg-tinker/tiny"
BATCH = {
    "input_ids": [[10, 20, 30, 40, 50, 60], [70, 80, 90, 100, 0, 0]],
    "attention_mask": [[1] * 6, [1, 1, 1, 1, 0, 0]],
}
SMALL = {"model_ref": TINY, "seed": 1, "lora_config": {"rank": 4, "dropout": 0.1}}


@pytest.fixture
async def real(serve, tmp_path: Path) -> Client:
    """A client of a server with the real engine."""
    return await serve(engine=TorchEngine(home=tmp_path, threads=1))


async def make(client: Client, **config) -> str:
    """A TG run on the tiny model."""
    return await client.create(TINY, **{**SMALL, **config, "model_ref": TINY})


async def step(client: Client, run: str) -> tuple[float, str, float]:
    """One pass and one step: loss, gradient hash, gradient norm."""
    future = await client.submit(f"{run}/forward_backward", {"batch": BATCH})
    taken = await client.run(f"{run}/optim_step")
    done = (await client.result(future))["result"]
    return done["loss"], done["gradient_hash"], taken["result"]["grad_norm"]


async def test_the_loss_is_the_models_own(real):
    """The loss of an untrained run is the base model's own Hugging Face loss, 1e-5."""
    import torch

    run = await make(real)
    loss = (await real.run(f"{run}/forward_backward", {"batch": BATCH, "mode": "eval"}))["result"]["loss"]
    (model,) = real.server.app[ROOMS].models.loaded()
    ids, mask = torch.tensor(BATCH["input_ids"]), torch.tensor(BATCH["attention_mask"])
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        wanted = float(model.base.model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    assert loss == pytest.approx(wanted, abs=1e-5)


async def test_training_resumes_bit_for_bit(real):
    """Saved, trained on, restored and trained again beside a second run: the same losses, hashes and norms."""
    run, other = await make(real), await make(real, seed=2)
    await step(real, run)
    saved = (await real.post(f"{run}/save_state", {"metadata": {"epoch": 1}})).json
    first = [await step(real, run) for _ in range(3)]
    loaded = (await real.post(f"{run}/load_state", {"artifact_id": saved["artifact_id"]})).json
    assert (loaded["step"], loaded["exact"], loaded["reasons"]) == (1, True, [])
    again = []
    for _ in range(3):
        mine, _ = await asyncio.gather(step(real, run), step(real, other))
        again.append(mine)
    assert again == first
    fresh = await make(real, seed=3, checkpoint_id=saved["artifact_id"])
    assert [await step(real, fresh) for _ in range(3)] == first


async def test_a_state_goes_on_in_another_precision(real):
    """Saved in fp32 and loaded in bf16, a state trains on; it is no exact resumption, and the reason is told."""
    quick = {"learning_rate": 0.01}
    run = await make(real, optimizer=quick)
    before, _, _ = await step(real, run)
    saved = (await real.post(f"{run}/save_state")).json
    wanted, _, _ = await step(real, run)
    other = await make(real, mixed_precision="bf16", optimizer=quick)
    loaded = (await real.post(f"{other}/load_state", {"artifact_id": saved["artifact_id"]})).json
    assert (loaded["step"], loaded["exact"], loaded["reasons"]) == (1, False, ["dtype: float32 then, bfloat16 now"])
    loss, _, _ = await step(real, other)
    assert abs(loss - wanted) < abs(loss - before)


async def test_without_the_optimizer_it_says_that_it_is_not_exact(real):
    """A state saved without moments restores the weights, and says why resuming is not exact."""
    run = await make(real)
    await step(real, run)
    saved = (await real.post(f"{run}/save_state", {"include_optimizer": False})).json
    loaded = (await real.post(f"{run}/load_state", {"artifact_id": saved["artifact_id"]})).json
    assert (loaded["step"], loaded["exact"]) == (1, False)
    assert "without the optimizer" in loaded["reasons"][0]


async def test_another_end_of_the_schedule_is_named(real):
    """A learning rate that falls over another number of steps is no exact resumption; a constant one asks for none."""
    falling = {"optimizer": {"lr_scheduler": "linear"}}
    for optimizer, exact in ((falling, False), ({}, True)):
        run = await make(real, **optimizer, max_steps=5)
        saved = (await real.post(f"{run}/save_state")).json["artifact_id"]
        longer = await make(real, **optimizer, max_steps=50)
        assert (await real.post(f"{run}/load_state", {"artifact_id": saved})).json["exact"] is True
        loaded = (await real.post(f"{longer}/load_state", {"artifact_id": saved})).json
        assert (loaded["exact"], ["50 steps here, over 5" in reason for reason in loaded["reasons"]]) == (
            exact,
            [] if exact else [True],
        )


async def test_a_stream_says_what_sample_says(real):
    """At one seed, sample and sample_stream give the same text, tokens and reason; each seed its own."""
    run = await make(real)
    asked = {"prompts": "hello", "max_tokens": 24, "seed": 7, "stop_sequences": ["zz"]}
    sample = (await real.post(f"{run}/sample", asked)).json["samples"][0]
    answer = await real.post(f"{run}/sample_stream", asked)
    *items, _ = frames.FrameReader().feed(answer.body)
    chunks = [item["item"] for item in items]
    assert "".join(chunk["text"] for chunk in chunks) == sample["completion"]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == sample["token_ids"]
    assert chunks[-1]["finish_reason"] == sample["finish_reason"]
    other = (await real.post(f"{run}/sample", {**asked, "seed": 8})).json["samples"][0]
    assert other["token_ids"] != sample["token_ids"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_sampled_logprobs_are_the_trainers(real, temperature):
    """Each sampled token's logprob is what forward gives it, 1e-4, after training and publishing."""
    trainer, sampler = await real.trainer(TINY, seed=5)
    await real.operate(trainer, "forward_backward", {"data": [datum(*range(20, 60))]})
    await real.operate(trainer, "optim_step", {"adam_params": {"learning_rate": 0.05}})
    await real.operate(trainer, "save_weights_for_sampler", {"name": "p"})
    prompt = list(b"abc")
    asked = {"prompt": prompt, "max_tokens": 12, "temperature": temperature, "seed": 3, "prompt_logprobs": 0, "n": 2}
    choices = (await real.post(f"{sampler}/sample", asked, X_Min_Policy_Version="1")).json["choices"]
    tokens = prompt + choices[0]["token_ids"]
    heat = [1.0] * (len(prompt) - 1) + [temperature] * len(choices[0]["token_ids"])  # a prompt is scored at 1
    inputs = {"target_tokens": {"data": tokens[1:], "dtype": "int64"}, "temperatures": {"data": heat}}
    body = {**datum(*tokens[:-1]), "loss_fn_inputs": inputs}
    forward = (await real.operate(trainer, "forward", {"data": [body]}))["result"]
    logprobs = forward["loss_fn_outputs"][0]["logprobs"]["data"]
    assert np.allclose(choices[0]["logprobs"]["token_logprobs"], logprobs[len(prompt) - 1 :], atol=1e-4)
    table = choices[0]["prompt_logprobs"]
    assert table[0] is None
    known = [table[i][str(prompt[i])]["logprob"] for i in range(1, len(prompt))]
    assert np.allclose(known, logprobs[: len(prompt) - 1], atol=1e-4)
    assert choices[0]["token_ids"] != choices[1]["token_ids"]


async def test_versions_of_one_run_sample_side_by_side(real):
    """Three versions asked at once each give what they give alone."""
    trainer, sampler = await real.trainer(TINY, seed=5)
    for number in range(3):
        await real.operate(trainer, "forward_backward", {"data": [datum(*range(20 + number, 60))]})
        await real.operate(trainer, "optim_step", {"adam_params": {"learning_rate": 0.05}})
        await real.operate(trainer, "save_weights_for_sampler", {"name": f"v{number}"})

    async def greedy(version: int) -> list[int]:
        asked = {"prompt": [65, 66], "max_tokens": 10, "temperature": 0}
        answer = await real.post(f"{sampler}/sample", asked, X_TG_Exact_Policy_Version=str(version))
        return answer.json["choices"][0]["token_ids"]

    alone = [await greedy(version) for version in (1, 2, 3)]
    assert list(await asyncio.gather(*(greedy(version) for version in (1, 2, 3)))) == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


BAD_PASSES = {
    "vocabulary": [datum(1, 10_000)],
    "too long": [datum(*[1] * 3000)],
    "not finite": [
        {
            "model_input": datum(1, 2)["model_input"],
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3], "dtype": "int64"},
                "logprobs": {"data": [-1.0, None]},
                "advantages": {"data": [1.0, 1.0]},
            },
        }
    ],
}


@pytest.mark.parametrize("fault", BAD_PASSES)
async def test_what_the_model_cannot_take_is_a_typed_error(real, fault):
    """Token out of vocabulary, too long, NaN: InvalidRequestError with the place, and the run trains on."""
    trainer, sampler = await real.trainer(TINY)
    loss = "importance_sampling" if fault == "not finite" else "cross_entropy"
    outcome = await real.operate(trainer, "forward_backward", {"data": BAD_PASSES[fault], "loss_fn": loss})
    assert (outcome["status"], outcome["code"], outcome["error_class"]) == ("error", "VALIDATION_ERROR", "ValueError")
    assert "data[0]" in str(outcome)
    assert (await real.operate(trainer, "forward_backward", {"data": [datum(1, 2)]}))["status"] == "done"
    assert (await real.operate(trainer, "optim_step", {"adam_params": {}}))["status"] == "done"
    refused = await real.post(f"{sampler}/sample", {"prompt": [10_000], "max_tokens": 1})
    assert (refused.status, refused.error["details"]["field"]) == (422, "prompt")


async def test_learning_happens(real):
    """Thirty steps on one batch through HTTP bring the loss down by half."""
    run = await make(real, optimizer={"learning_rate": 0.02})
    losses = [(await step(real, run))[0] for _ in range(30)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] / 2
