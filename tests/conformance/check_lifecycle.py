"""Making runs and looking at them, with every way that the published client has of finding a server."""

from __future__ import annotations

import httpx
import pytest
from baseten.loops import ModelInput, SamplingParams, ServiceClient, TrainingClient
from published import PROMPT, SECONDS, STEP, TINY, learn, lesson


async def test_the_models_are_told(service):
    """Capabilities name the built-in model, from both faces."""
    for found in (service.get_server_capabilities(), await service.get_server_capabilities_async()):
        assert TINY in {model.model_name for model in found.supported_models}


def test_sessions_are_apart(server, service):
    """Every ServiceClient has a session of its own."""
    assert service.session_id
    assert server.service().session_id != service.session_id


def test_a_new_run_is_at_its_beginning(trainer):
    """A run is healthy, at step 0, and knows what it is."""
    assert trainer.run_id
    trainer.health()
    assert trainer.policy_version == 0
    info = trainer.get_info()
    assert (info.model_name, info.is_lora, info.lora_rank) == (TINY, True, 8)


def test_a_run_begins_afresh(trainer):
    """init_trainer_server gives a fresh adapter of another rank, at step 0, with the loss of the base model."""
    first, *_ = learn(trainer, 2)
    assert trainer.policy_version == 2
    fresh = trainer.init_trainer_server(lora_rank=4).result(timeout=SECONDS)
    assert (fresh.step, fresh.lora_rank) == (0, 4)
    assert trainer.policy_version == 0
    assert trainer.forward(lesson(), "cross_entropy").result(timeout=SECONDS).loss == pytest.approx(first, abs=1e-5)


async def test_runs_are_made_from_coroutines(service):
    """The asynchronous factory gives a run as the blocking one does, and it is closed from a coroutine."""
    trainer = await service.create_lora_training_client_async(base_model=TINY, rank=4, seed=3)
    step = await trainer.forward_backward_async(lesson(), "cross_entropy")
    assert (await step).loss > 0
    await trainer.aclose()


def test_equal_seeds_give_equal_runs(service):
    """The seed of create_lora_training_client is honoured."""

    def losses(seed: int) -> list[float]:
        with service.create_lora_training_client(base_model=TINY, rank=4, seed=seed) as trainer:
            return learn(trainer, 3)

    assert losses(5) == pytest.approx(losses(5), abs=1e-6)
    assert losses(5) != losses(6)


def test_a_local_server_is_taken_as_it_is(open_server):
    """ServiceClient.local trains and samples at the addresses of a run that was made otherwise."""
    asked = {"base_model": TINY, "lora_rank": 4}
    made = httpx.post(f"{open_server.url}/v1/loops/runs", json=asked, timeout=SECONDS).json()["run"]
    service = ServiceClient.local(trainer_url=made["base_url"], sampler_url=made["sampler"]["base_url"])
    with service.create_lora_training_client(base_model=TINY, rank=4) as trainer:
        first, second = learn(trainer, 2)
        assert second < first
        assert trainer.policy_version == 2
    sampler = service.create_sampling_client(base_model=TINY)
    answer = sampler.sample(ModelInput.from_ints(PROMPT), 1, SamplingParams(max_tokens=4, seed=1))
    assert len(answer.sequences[0].tokens) == 4
    assert sampler.discover_base_model_name() == TINY
    sampler.close()


def test_a_trainer_is_built_by_hand(server, trainer):
    """A TrainingClient at the address of a live run starts it afresh, and trains it."""
    learn(trainer)
    key, model = server.key, TINY
    with TrainingClient(trainer._base_url, lora_rank=4, base_model=model, api_key=key, run_id=trainer.run_id) as other:
        assert other.policy_version == 0
        assert other.forward_backward(lesson()).result(timeout=SECONDS).loss > 0
        assert other.optim_step(STEP).result(timeout=SECONDS).metrics["step"] == 1.0


def test_a_run_is_deactivated(server, service):
    """A deactivated run takes nothing more, and says so at once; its checkpoints stay."""
    said = {"Authorization": f"Api-Key {server.key}"}
    with service.create_lora_training_client(base_model=TINY, rank=4) as trainer:
        trainer.save_state("kept").result(timeout=SECONDS)
        url = f"{server.url}/v1/loops/runs/{trainer.run_id}"
        answer = httpx.post(f"{url}/deactivate", headers=said)
        assert (answer.status_code, answer.json()["id"]) == (200, trainer.run_id)
        assert httpx.get(url, headers=said).status_code == 404
        with pytest.raises(httpx.HTTPStatusError, match="no such run"):
            trainer.optim_step(STEP)
        assert {one.checkpoint_id for one in trainer.list_checkpoints()} == {"kept"}
