"""What goes wrong is said at once.

That client takes some statuses for a server that is still starting, and tries again for an hour, which is longer than a
check may take: none of them may be the answer to what can never succeed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
from baseten.loops import (
    AdamParams,
    ImageChunk,
    ModelInput,
    RemoteOpError,
    SamplingParams,
    TrainingClient,
    UnknownRequestError,
)
from published import PROMPT, SECONDS, STEP, TINY, datum, learn, lesson, publish

MODEL_INPUT = ModelInput.from_ints(PROMPT)
HEAVY = [datum([number % 200 + 1 for number in range(400)])] * 24


@pytest.mark.parametrize("key", ["tg_0000000000000000_" + "x" * 43, "nothing-like-a-key"])
def test_a_wrong_key_opens_nothing(server, key):
    """Without a key that the server knows there is no session."""
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        server.service(key)


def test_an_unknown_run_is_said_at_once(server, trainer):
    """A trainer at the address of a run that is not there fails in its first request."""
    url = trainer._base_url.replace(trainer.run_id, "run-unknown")
    with pytest.raises(httpx.HTTPStatusError, match="no such run"):
        TrainingClient(url, lora_rank=4, base_model=TINY, api_key=server.key)


def test_the_runs_of_others_are_not_there(server, trainer):
    """Another tenant finds neither the run, nor its operations, nor its checkpoints, nor its sampler."""
    path = trainer.save_weights_for_sampler("mine").result(timeout=SECONDS).path
    (checkpoint,) = trainer.list_checkpoints()
    other = server.service(server.other_key)
    assert other.list_checkpoints(trainer.run_id) == []
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        other.get_checkpoint_archive_url(checkpoint.id)
    with pytest.raises((httpx.HTTPStatusError, ValueError), match=r"404|No Loops checkpoint found"):
        other.create_training_client_from_state(path)
    with pytest.raises(httpx.HTTPStatusError, match="no such run"):
        TrainingClient(trainer._base_url, lora_rank=4, base_model=TINY, api_key=server.other_key)
    said = {"Authorization": f"Api-Key {server.other_key}"}
    run, operation = f"{server.url}/v1/loops/runs/{trainer.run_id}", trainer.optim_step(STEP).operation_id
    assert httpx.get(run, headers=said).status_code == 404
    assert httpx.post(f"{run}/deactivate", headers=said).status_code == 404
    assert httpx.get(f"{trainer._base_url}/operations/{operation}", headers=said).status_code == 404
    trainer.health()


REFUSED = [
    ("loss_fn", lambda trainer: trainer.forward_backward(lesson(), "gspo")),
    ("logprobs", lambda trainer: trainer.forward_backward(lesson(), "ppo")),
    ("clip_low", lambda trainer: trainer.forward_backward(lesson(), "ppo", {"clip_low": 0.5})),
    ("data", lambda trainer: trainer.forward_backward([], "cross_entropy")),
    ("token", lambda trainer: trainer.forward_backward([datum([1, 2, 10**6])], "cross_entropy").result(SECONDS)),
    ("learning_rate", lambda trainer: trainer.optim_step(AdamParams(learning_rate=-1.0))),
    ("name", lambda trainer: trainer.save_state("../up")),
    ("ttl_seconds", lambda trainer: trainer.save_state("a", ttl_seconds=0)),
    ("path", lambda trainer: trainer.load_state("s3://elsewhere")),
    ("lora_rank", lambda trainer: trainer.init_trainer_server(lora_rank=-1).result(SECONDS)),
]


@pytest.mark.parametrize(("named", "wrong"), REFUSED, ids=[named for named, _ in REFUSED])
def test_what_is_wrong_is_named(trainer, named, wrong):
    """Whatever can never succeed is refused at once, by the name of what is wrong; the run goes on."""
    with pytest.raises((httpx.HTTPStatusError, RemoteOpError), match=named):
        wrong(trainer)
    first, second = learn(trainer, 2)
    assert second < first


WRONG_SAMPLES = [
    ("temperature", MODEL_INPUT, SamplingParams(max_tokens=1, temperature=-3.0)),
    ("top_p", MODEL_INPUT, SamplingParams(max_tokens=1, top_p=2.0)),
    ("max_tokens", MODEL_INPUT, SamplingParams(max_tokens=-1)),
    ("prompt", ModelInput.empty(), SamplingParams(max_tokens=1)),
    (
        "text",
        ModelInput(chunks=[ImageChunk(data=b"iVBORw==", format="png", expected_tokens=4)]),
        SamplingParams(max_tokens=1),
    ),
    ("prompt", ModelInput.from_ints([1] * 100_000), SamplingParams(max_tokens=1)),
]


@pytest.mark.parametrize(("named", "prompt", "params"), WRONG_SAMPLES)
def test_a_sample_that_cannot_be_had_is_refused(trainer, named, prompt, params):
    """Bad parameters, images and prompts that are too long are refused at once, by name."""
    sampler = publish(trainer, "refusing")
    with pytest.raises(httpx.HTTPStatusError, match=named):
        sampler.sample(prompt, 1, params)
    sampler.close()


def test_a_cancelled_operation_is_told(server, trainer):
    """What was cancelled in the queue fails as cancelled, and what is behind it goes on."""
    said = {"Authorization": f"Api-Key {server.key}"}
    ahead = [trainer.forward(HEAVY, "cross_entropy") for _ in range(5)]
    doomed, behind = trainer.forward(lesson(), "cross_entropy"), trainer.forward(lesson(), "cross_entropy")
    answer = httpx.post(f"{trainer._base_url}/operations/{doomed.operation_id}/cancel", headers=said)
    assert answer.status_code == 200
    with pytest.raises(RemoteOpError, match="cancel") as caught:
        doomed.result(timeout=SECONDS)
    assert caught.value.error_class
    assert behind.result(timeout=SECONDS).loss > 0
    for one in ahead:
        assert one.result(timeout=SECONDS).loss > 0
        done = httpx.post(f"{trainer._base_url}/operations/{one.operation_id}/cancel", headers=said)
        assert done.status_code == 409


async def test_a_cancelled_sample_frees_its_place(trainer):
    """Tasks that are cancelled while they sample take nothing from those that come after."""
    sampler = await trainer.save_weights_and_get_sampling_client_async("busy")
    long = SamplingParams(max_tokens=400)
    tasks = [asyncio.create_task(sampler.sample_async(MODEL_INPUT, 1, long)) for _ in range(80)]
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    answer = await sampler.sample_async(MODEL_INPUT, 1, SamplingParams(max_tokens=4))
    assert len(answer.sequences[0].tokens) == 4
    await sampler.aclose()


def test_an_operation_that_never_was_is_unknown(trainer):
    """Asking for the result of an operation that the server does not know is UnknownRequestError."""
    future = trainer.forward(lesson(), "cross_entropy")
    lost = trainer.forward(lesson(), "cross_entropy")
    trainer._client.event_hooks["request"].append(_elsewhere(lost.operation_id))
    with pytest.raises(UnknownRequestError):
        lost.result(timeout=SECONDS)
    assert future.result(timeout=SECONDS).loss > 0


def _elsewhere(operation_id: str) -> Callable[[httpx.Request], None]:
    """A hook that makes a poll ask for another operation."""

    def redirect(request: httpx.Request) -> None:
        request.url = httpx.URL(str(request.url).replace(operation_id, "never-submitted"))

    return redirect
