"""Entries of the TrainingClient page by their effect: what costs a round trip, what expires, what a wait bounds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fixtures.asleep import asleep
from fixtures.programs import LOOPS_RANK, MODEL, datum

from tg_tinker import ServiceClient, loops
from tg_tinker.errors import (
    ClientClosedError,
    FutureTimeoutError,
    InvalidRequestError,
    ResourceNotFoundError,
    SamplerNotReadyError,
)
from tg_tinker.loops import AdamParams, SamplingParams

pytestmark = pytest.mark.timeout(240)


def test_what_needs_no_round_trip(home: Path, trainer: loops.TrainingClient) -> None:
    """``get_info`` and ``run_id`` ask nobody, and the tokenizer is loaded once: they work while the server sleeps."""
    tokenizer = trainer.get_tokenizer()
    with asleep(home):
        assert trainer.get_info().model_name == MODEL
        assert trainer.get_info().lora_rank == LOOPS_RANK
        assert str(trainer.run_id).startswith("run-")
        assert trainer.get_tokenizer() is tokenizer


def test_policy_version_asks_each_time(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """It counts the steps that anybody applied to the trainer, as of this moment."""
    other = service.attach(str(trainer.run_id))
    for number in range(3):
        assert trainer.policy_version == number
        other.forward_backward([datum()])
        other.optim_step(AdamParams()).result(timeout=60)
    assert trainer.policy_version == 3


def test_a_time_to_live_is_kept(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """A state and a published adapter are gone when their ``ttl_seconds`` are over; what has none stays."""
    state = trainer.save_state(name="brief", ttl_seconds=1).result(timeout=60).path
    adapter = trainer.save_weights_for_sampler(name="brief", ttl_seconds=1).result(timeout=60).path
    trainer.save_state(name="lasting").result(timeout=60)
    time.sleep(1.2)
    assert [one.checkpoint_id for one in trainer.list_checkpoints()] == ["lasting"]
    with pytest.raises(ResourceNotFoundError):
        trainer.load_state(path=state).result(timeout=60)
    with pytest.raises(ResourceNotFoundError):
        trainer.create_sampling_client(model_path=adapter)
    with pytest.raises(ResourceNotFoundError):
        service.create_training_client_from_state(state)


async def test_a_wait_for_a_publish_can_be_repeated(home: Path, trainer: loops.TrainingClient) -> None:
    """A timeout bounds the wait alone; the publish goes on, and its own ceiling has an error of two kinds."""
    with asleep(home):
        future = trainer.save_weights_and_get_sampling_client(name="slow")
        with pytest.raises(FutureTimeoutError):
            await future.result_async(timeout=0.1)
    sampler = await future.result_async(timeout=60)
    answer = await sampler.sample_async([72], 1, SamplingParams(max_tokens=1))
    assert answer.policy_version == sampler.min_policy_version == 1
    assert issubclass(SamplerNotReadyError, RuntimeError)


def test_a_sampler_checkpoint_is_not_resumed_from(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """It holds the adapter alone: loading it and making a run of it are refused with the reason."""
    path = trainer.save_weights_for_sampler("adapter").result(timeout=60).path
    for load in (trainer.load_state, trainer.load_state_with_optimizer):
        with pytest.raises(ValueError, match="sampl"):
            load(path).result(timeout=60)
    with pytest.raises(ValueError, match="sampl"):
        service.create_training_client_from_state(path)
    assert trainer.policy_version == 0


def test_a_state_does_not_serve_sampling(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """Its path is refused at the call, by both ways to a sampler, though there is such a checkpoint."""
    path = trainer.save_state("state").result(timeout=60).path
    for sampler in (trainer.create_sampling_client, lambda path: service.create_sampling_client(model_path=path)):
        with pytest.raises(InvalidRequestError, match="a state is to resume from") as caught:
            sampler(path)
        assert caught.value.field == "model_path"


def test_a_block_closes_its_client(service: ServiceClient) -> None:
    """``with`` gives trainer and sampler, and closes them at its end; the service stays open."""
    with service.create_lora_training_client(MODEL, LOOPS_RANK) as trainer:
        with trainer.save_weights_and_get_sampling_client("a").result(timeout=60) as sampler:
            assert sampler.sample([72], 1, SamplingParams(max_tokens=1)).policy_version == 1
        with pytest.raises(ClientClosedError):
            sampler.sample([72])
        assert trainer.policy_version == 0
    with pytest.raises(ClientClosedError):
        trainer.forward([datum()])
    assert service.attach(str(trainer.run_id)).policy_version == 0


async def test_a_block_of_a_coroutine_closes_its_client(home: Path, service: ServiceClient) -> None:
    """``async with`` does the same."""
    async with loops.ServiceClient(home=home) as client:
        async with await client.create_lora_training_client_async(MODEL, LOOPS_RANK) as trainer:
            assert await trainer.policy_version_async() == 0
        with pytest.raises(ClientClosedError):
            await trainer.policy_version_async()


def test_a_deactivated_run_is_gone(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """Trainer and sampler are not found any more; the checkpoints are, and a new run starts from them."""
    path = trainer.save_state("kept").result(timeout=60).path
    sampler = trainer.save_weights_and_get_sampling_client("served").result(timeout=60)
    service.deactivate_run(str(trainer.run_id))
    for call in (lambda: trainer.policy_version, lambda: sampler.sample([72]), lambda: trainer.forward([datum()])):
        with pytest.raises(ResourceNotFoundError):
            call()
    assert [one.checkpoint_id for one in trainer.list_checkpoints()] == ["kept", "served"]
    again = service.create_training_client_from_state(path)
    with pytest.raises(ResourceNotFoundError):
        service.deactivate_run(str(trainer.run_id))
    assert again.policy_version == 0


async def test_a_run_is_deactivated_from_a_coroutine(service: ServiceClient, trainer: loops.TrainingClient) -> None:
    """The awaitable form ends a run as well."""
    await service.deactivate_run_async(str(trainer.run_id))
    with pytest.raises(ResourceNotFoundError):
        await trainer.policy_version_async()
