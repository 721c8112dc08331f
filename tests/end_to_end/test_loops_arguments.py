"""The published arguments of the creators, each with the effect that it promises, against a real embedded server."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fixtures.asleep import asleep
from fixtures.programs import LOOPS_RANK, MODEL, datum

from tg_tinker import ServiceClient, loops
from tg_tinker.embedded import server_of
from tg_tinker.errors import (
    FutureTimeoutError,
    InvalidRequestError,
    ResourceNotFoundError,
    ServerUnreachableError,
    TGTinkerError,
)
from tg_tinker.loops import AdamParams, SamplingParams

pytestmark = pytest.mark.timeout(240)
STEP = AdamParams(learning_rate=1e-2)
ONE = SamplingParams(max_tokens=1, seed=1)
SIGNATURES: dict[str, dict[str, Any]] = {
    "create_lora_training_client": {
        "base_model": inspect.Parameter.empty, "rank": 32, "replicas": 1, "seed": None, "max_seq_len": None,
        "timeout": None, "ready_timeout": None, "sampler_timeout": None, "wandb_config": None, "with_sampler": False,
        "name": None, "sampler_num_replicas": None, "scope": None, "dp_config": None, "tracker": None,
    },
    "create_training_client_from_state": {"path": inspect.Parameter.empty, "user_metadata": None, "replicas": 1},
    "create_training_client_from_state_with_optimizer": {
        "path": inspect.Parameter.empty, "user_metadata": None, "replicas": 1,
    },
    "create_sampling_client": {
        "base_model": None, "timeout": None, "ready_timeout": None, "model_path": None, "max_seq_len": None,
        "num_replicas": None, "scope": None,
    },
    "list_checkpoints": {"run_id": inspect.Parameter.empty},
    "get_checkpoint_archive_url": {
        "checkpoint_id": None, "name": None, "run_id": None, "target": None, "page_size": 1000, "page_token": 0,
    },
    "download_checkpoint": {
        "checkpoint_id": None, "dest_dir": inspect.Parameter.empty, "name": None, "run_id": None, "target": None,
        "progress": None,
    },
    "get_server_capabilities": {},
}  # fmt: skip


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_names_and_order_are_those_published(name: str) -> None:
    """Both faces take the published arguments in the published order; ours come after them, by keyword."""
    for face in (name, f"{name}_async"):
        parameters = dict(inspect.signature(getattr(ServiceClient, face)).parameters)
        del parameters["self"]
        assert {key: one.default for key, one in parameters.items()} == SIGNATURES[name]
        assert list(parameters) == list(SIGNATURES[name])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s.create_lora_training_client(MODEL, with_samplers=True), "'with_samplers'; did you mean 'with_s"),
        (lambda s: s.create_lora_training_client(MODEL, lora_rank=8), "'lora_rank'; did you mean 'rank'"),
        (lambda s: s.create_lora_training_client(MODEL, zzz=8), "'zzz'; it takes base_model, rank, replicas"),
        (lambda s: s.create_sampling_client(model_pth="x"), "'model_pth'; did you mean 'model_path'"),
        (lambda s: s.create_training_client_from_state("x", replica=1), "'replica'; did you mean 'replicas'"),
    ],
)
def test_a_misspelt_argument_is_refused_with_the_nearest_name(
    service: ServiceClient, call: Callable[[Any], Any], said: str
) -> None:
    """As Python refuses it, and with what may have been meant."""
    with pytest.raises(TypeError) as caught:
        call(service)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": "60"}, "timeout"),
        ({"ready_timeout": -1.0}, "ready_timeout"),
        ({"sampler_timeout": float("inf")}, "sampler_timeout"),
        ({"with_sampler": 1}, "with_sampler"),
        ({"sampler_num_replicas": 2}, "sampler_num_replicas"),
        ({"replicas": 0}, "replicas"),
        ({"scope": "galaxy"}, "scope"),
        ({"scope": "serverless"}, "scope"),
    ],
)
def test_values_are_checked_by_name(service: ServiceClient, arguments: dict[str, Any], field: str) -> None:
    """What does not fit is refused before anything is sent."""
    with pytest.raises(InvalidRequestError) as caught:
        service.create_lora_training_client(MODEL, LOOPS_RANK, **arguments)
    assert caught.value.field == field


@pytest.mark.parametrize("scope", ["default", "team", "deployment", None])
def test_every_scope_that_is_offered_works(service: ServiceClient, scope: Any) -> None:
    """A scope tells a published control plane where to run; here all of them give a run and a sampler."""
    run = service.create_lora_training_client(MODEL, LOOPS_RANK, scope=scope)
    assert run.policy_version == 0
    assert service.create_sampling_client(MODEL, scope=scope).sample([72], 1, ONE).sequences


def test_ready_timeout_bounds_the_creation(service: ServiceClient) -> None:
    """A creation that takes longer ends in a timeout that names the argument; the service stays usable."""
    with pytest.raises(FutureTimeoutError, match="ready_timeout") as caught:
        service.create_lora_training_client(MODEL, LOOPS_RANK, ready_timeout=0.0005)
    assert caught.value.timeout == 0.0005
    with pytest.raises(TimeoutError):
        service.create_sampling_client(MODEL, ready_timeout=0.0001)
    assert service.create_lora_training_client(MODEL, LOOPS_RANK, ready_timeout=120).policy_version == 0


def test_timeouts_bound_the_silence(home: Path, service: ServiceClient) -> None:
    """``timeout`` is the trainer's, ``sampler_timeout`` its sampler's; both override the service's own 300 seconds."""
    with ServiceClient(home=home, retry_count=0) as client:
        run = client.create_lora_training_client(MODEL, LOOPS_RANK, timeout=5.0, sampler_timeout=5.0)
        paired = run.save_weights_and_get_sampling_client("a").result(timeout=60)
        alone = client.create_sampling_client(MODEL, timeout=5.0)
        calls: list[Callable[[], Any]] = [
            lambda: run.policy_version,
            run.health,
            lambda: run.forward([datum()]),
            lambda: paired.sample([72], 1, ONE),
            lambda: alone.sample([72], 1, ONE),
        ]
        with asleep(home), ThreadPoolExecutor(len(calls)) as pool:
            failures = [future.exception() for future in [pool.submit(call) for call in calls]]
        assert [type(failure) for failure in failures] == [ServerUnreachableError] * len(calls)
        assert run.forward([datum()]).result(timeout=60).loss > 0
        assert paired.sample([72], 1, SamplingParams(max_tokens=1)).sequences


@pytest.mark.parametrize("wanted", [True, False])
def test_with_sampler_opens_it_at_once(home: Path, service: ServiceClient, wanted: bool) -> None:
    """Asked for, the run's sampler is there before anything is published; otherwise the first publish opens it."""
    process = server_of(home).process
    assert process is not None
    run = service.create_lora_training_client(MODEL, LOOPS_RANK, with_sampler=wanted, sampler_num_replicas=1)
    address = f"{process.url}/loops/samplers/smp-{run.run_id}"
    with loops.ServiceClient.local(sampler_url=address, api_key=process.key) as client:
        if wanted:
            assert client.create_sampling_client(MODEL).sample([72], 1, ONE).policy_version == 0
        else:
            with pytest.raises(ResourceNotFoundError):
                client.create_sampling_client(MODEL)


def test_save_state_publishes_to_a_sampler_that_was_asked_for(home: Path, service: ServiceClient) -> None:
    """A run with its sampler serves what it saves, as the next version, under the same name and time to live."""
    process = server_of(home).process
    assert process is not None
    run = service.create_lora_training_client(MODEL, LOOPS_RANK, seed=1, with_sampler=True)
    for _ in range(3):
        run.forward_backward([datum()])
        run.optim_step(STEP)
    wanted = run.forward([datum()]).result(timeout=60).loss_fn_outputs[0]["logprobs"].tolist()
    saved = run.save_state("both", ttl_seconds=3600).result(timeout=60)
    assert saved.path == f"bt://loops:{run.run_id}/weights/both"
    found = {one.target: one for one in run.list_checkpoints()}
    assert {one.checkpoint_id for one in found.values()} == {"both"}
    assert found.keys() == {"trainer", "sampler"}
    assert all(one.expires_at is not None for one in found.values())
    address = f"{process.url}/loops/samplers/smp-{run.run_id}"
    with loops.ServiceClient.local(sampler_url=address, api_key=process.key) as client:
        polling = client.create_sampling_client(MODEL)
        assert polling.sample([72], 1, ONE).policy_version == 1
        assert polling.compute_logprobs(datum().model_input)[1:] == pytest.approx(wanted[:-1], abs=1e-4)
        run.save_state("both").result(timeout=60)
        assert polling.sample([72], 1, ONE).policy_version == 2
    assert run.save_weights_for_sampler("next").result(timeout=60).version == 3


def test_save_state_alone_publishes_nothing(trainer: loops.TrainingClient) -> None:
    """Without a sampler that was asked for, a saved state is a trainer's checkpoint and no version."""
    trainer.save_state("alone").result(timeout=60)
    assert [one.target for one in trainer.list_checkpoints()] == ["trainer"]
    assert trainer.save_weights_for_sampler("first").result(timeout=60).version == 1


async def test_the_awaitable_creators_take_them_too(home: Path) -> None:
    """Every creator's twin has the arguments, W&B's among them, and raises the same errors."""
    async with loops.ServiceClient(home=home) as service:
        run = await service.create_lora_training_client_async(
            base_model=MODEL, rank=LOOPS_RANK, timeout=60.0, ready_timeout=120.0, with_sampler=True, scope="default"
        )
        path = (await (await run.save_state_async("a"))).path
        again = await service.create_training_client_from_state_async(path, {"kept": "nowhere"}, replicas=1)
        assert again.get_info().lora_rank == LOOPS_RANK
        errors: list[type[TGTinkerError]] = [FutureTimeoutError, InvalidRequestError]
        for error, limit in zip(errors, (0.0001, 0.0), strict=True):
            with pytest.raises(error):
                await service.create_sampling_client_async(MODEL, ready_timeout=limit)
