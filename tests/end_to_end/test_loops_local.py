"""``ServiceClient.local``: a running trainer and sampler taken up by their addresses, ours and published ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.programs import LOOPS_RANK, MODEL, datum
from fixtures.worker import Worker

from tg_tinker import ServiceClient, loops
from tg_tinker.embedded import server_of
from tg_tinker.embedded.process import ServerProcess
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.loops import AdamParams, SamplingParams

pytestmark = pytest.mark.timeout(240)
STEP = AdamParams(learning_rate=1e-2)
SHORT = SamplingParams(max_tokens=2, seed=1)


@pytest.fixture
def process(home: Path, service: ServiceClient) -> ServerProcess:
    """The shared server's process, for its address and key."""
    found = server_of(home).process
    assert found is not None
    return found


@pytest.fixture
def paired(trainer: loops.TrainingClient) -> loops.TrainingClient:
    """A run whose sampler is open."""
    trainer.create_sampling_client(trainer.save_weights_for_sampler("first").result(timeout=60).path)
    return trainer


@pytest.fixture
def local(process: ServerProcess, paired: loops.TrainingClient) -> Iterator[loops.ServiceClient]:
    """A client of the addresses of ``trainer`` and its sampler, and of nothing else."""
    with loops.ServiceClient.local(
        trainer_url=f"{process.url}/loops/trainers/{paired.run_id}",
        sampler_url=f"{process.url}/loops/samplers/smp-{paired.run_id}",
        api_key=process.key,
    ) as client:
        yield client


@pytest.fixture
async def worker(process: ServerProcess, paired: loops.TrainingClient) -> AsyncIterator[Worker]:
    """A published trainer and sampler at one root."""
    async with Worker(process.url, process.key, str(paired.run_id)) as worker:
        yield worker


def test_attaching_takes_a_trainer_up_as_it_is(local: loops.ServiceClient, trainer: loops.TrainingClient) -> None:
    """Nothing is reset: step, rank and weights are those of the run, whose id is read from the address."""
    trainer.forward_backward([datum()])
    trainer.optim_step(STEP).result(timeout=60)
    taken = local.attach()
    assert (taken.run_id, taken.policy_version, taken.get_info()) == (trainer.run_id, 1, trainer.get_info())
    assert taken.forward([datum()]).result(timeout=60) == trainer.forward([datum()]).result(timeout=60)
    assert local.attach(str(trainer.run_id)).policy_version == 1
    with pytest.raises(ResourceNotFoundError):
        local.attach("run-another")


def test_everything_works_through_it(local: loops.ServiceClient, trainer: loops.TrainingClient, tmp_path: Path) -> None:
    """Saving, publishing, pinned sampling, loading, listing and downloading need nothing but the two addresses."""
    run = local.create_lora_training_client(MODEL, rank=8)
    assert (run.run_id, run.policy_version, run.get_info().lora_rank) == (trainer.run_id, 0, 8)
    run.forward_backward([datum()])
    run.optim_step(STEP).result(timeout=60)
    saved = run.save_state("here").result(timeout=60).path
    assert saved == f"bt://loops:{trainer.run_id}/weights/here"
    published = run.save_weights_for_sampler("there").result(timeout=60)
    pinned = run.save_weights_and_get_sampling_client("pinned").result(timeout=120)
    answer = pinned.sample([72], 1, SHORT)
    assert answer.policy_version == pinned.min_policy_version == published.version + 1
    assert run.create_sampling_client(published.path).sample([72], 1, SHORT).policy_version == published.version
    assert local.create_sampling_client(MODEL).get_base_model() == MODEL
    assert run.load_state_with_optimizer(saved).result(timeout=60).step == 1
    assert {one.checkpoint_id for one in run.list_checkpoints()} == {"first", "here", "there", "pinned"}
    assert local.download_checkpoint(saved, dest_dir=tmp_path).file_count == 4
    again = local.create_training_client_from_state_with_optimizer(saved)
    assert (again.run_id, again.policy_version, again.get_info().lora_rank) == (trainer.run_id, 1, 8)
    assert run.get_tokenizer().encode("a") == [97]
    assert local.get_server_capabilities().losses


def test_a_trainer_of_ours_has_its_sampler(process: ServerProcess, trainer: loops.TrainingClient) -> None:
    """Without a sampler's address our server is asked for the run's own."""
    address = f"{process.url}/loops/trainers/{trainer.run_id}"
    with ServiceClient.local(trainer_url=address, api_key=process.key) as client:
        sampler = client.attach().save_weights_and_get_sampling_client("own").result(timeout=120)
        assert sampler.sample([72], 1, SHORT).policy_version == 1


async def test_a_published_worker(worker: Worker) -> None:
    """A worker that knows no run and no control plane: an id is drawn for it, and the operations all work."""
    async with loops.ServiceClient.local(trainer_url=worker.url, sampler_url=worker.url) as client:
        run = await client.create_lora_training_client_async(MODEL, rank=LOOPS_RANK, with_sampler=True)
        assert str(run.run_id).startswith("local-")
        await run.forward_backward([datum()])
        assert (await run.optim_step(STEP)).metrics is not None
        await run.save_state("here")
        assert await run.policy_version_async() == 1
        sampler = await run.save_weights_and_get_sampling_client_async("pinned")
        assert (await sampler.sample_async([72], 1, SHORT)).policy_version == sampler.min_policy_version
        taken = await client.attach_async()
        assert (taken.run_id, taken.get_info().model_name, taken.get_info().lora_rank) == (run.run_id, MODEL, None)
        assert await taken.policy_version_async() == 1
        with pytest.raises(ResourceNotFoundError):
            await run.list_checkpoints_async()
    assert worker.asked.count("/init_trainer_server") == 1


async def test_every_sample_of_a_pinned_client_says_so(worker: Worker) -> None:
    """Samples and scores carry the version in ``X-Min-Policy-Version``; those of a base model insist on nothing."""
    async with loops.ServiceClient.local(trainer_url=worker.url, sampler_url=worker.url) as client:
        run = await client.attach_async()
        for _ in range(2):
            sampler = await run.save_weights_and_get_sampling_client_async("pinned")
            await sampler.sample_async([72], 1, SHORT)
            await sampler.compute_logprobs_async([72, 73])
        await (await client.create_sampling_client_async(MODEL)).sample_async([72], 1, SHORT)
        version = sampler.min_policy_version or 0
    assert worker.pins == [str(version - 1)] * 2 + [str(version)] * 2 + [None]


async def test_a_worker_s_run_may_be_named(worker: Worker, trainer: loops.TrainingClient) -> None:
    """``run_id`` goes into checkpoint URIs, so what another client of the worker saved is found again."""
    path = (await (await trainer.save_state_async("kept"))).path
    adapter = (await (await trainer.save_weights_for_sampler_async("kept"))).path
    named = str(trainer.run_id)
    async with loops.ServiceClient.local(trainer_url=worker.url, sampler_url=worker.url, run_id=named) as client:
        run = await client.attach_async()
        assert (await run.load_state(path)).step == 0
        sampler = await run.create_sampling_client_async(adapter)
        assert (await sampler.sample_async([72], 1, SHORT)).sequences


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (loops.ServiceClient.local, "trainer_url"),
        (lambda: loops.ServiceClient.local(trainer_url="worker:80"), "trainer_url"),
        (lambda: loops.ServiceClient.local(sampler_url=7), "sampler_url"),  # type: ignore[arg-type]
        (lambda: loops.ServiceClient.local(trainer_url="http://worker:80", run_id=""), "run_id"),
    ],
)
def test_wrong_addresses_are_refused(call: Callable[[], Any], field: str) -> None:
    """Addresses and run are checked before anything is asked."""
    with pytest.raises(InvalidRequestError) as caught:
        call()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"seed": 1}, "seed"), ({"name": "n"}, "name"), ({"dp_config": {}}, "dp_config"), ({}, "base_model")],
)
def test_what_a_running_trainer_cannot_be_told_is_refused(
    local: loops.ServiceClient, trainer: loops.TrainingClient, arguments: dict[str, Any], field: str
) -> None:
    """A seed, a name, privacy or another base model come too late; the trainer is left as it was."""
    trainer.forward_backward([datum()])
    trainer.optim_step(STEP).result(timeout=60)
    with pytest.raises(InvalidRequestError) as caught:
        local.create_lora_training_client(MODEL if arguments else "another/model", **arguments)
    assert caught.value.field == field
    assert trainer.policy_version == 1


def test_a_part_that_is_missing_is_named(process: ServerProcess, paired: loops.TrainingClient) -> None:
    """A client of a sampler alone trains nothing, and a sampler's model is what it serves."""
    address = f"{process.url}/loops/samplers/smp-{paired.run_id}"
    with loops.ServiceClient.local(sampler_url=address, api_key=process.key) as client:
        assert client.create_sampling_client(MODEL).sample([72], 1, SHORT).policy_version == 1
        for call, field in (
            (lambda: client.create_lora_training_client(MODEL), "trainer_url"),
            (client.attach, "trainer_url"),
            (lambda: client.create_sampling_client("another/model"), "base_model"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                call()
            assert caught.value.field == field
