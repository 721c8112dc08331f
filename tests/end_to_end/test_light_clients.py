"""Clients hold nothing of their own: closed or forgotten, they leave no thread, no file and no server behind."""

from __future__ import annotations

import asyncio
import gc
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fixtures.client import idle
from fixtures.processes import open_files
from fixtures.programs import LOOPS_RANK, MODEL, datum

from tg_tinker import AdamParams, SamplingClient, SamplingParams, ServiceClient, TrainingClient, loops
from tg_tinker.embedded import server_of
from tg_tinker.loops import WandbConfig

pytestmark = pytest.mark.timeout(240)
MANY = 30
ONE = SamplingParams(max_tokens=1, seed=1)


def sockets() -> set[str]:
    """The sockets that this process has open."""
    return {name for name in open_files() if name.startswith("socket:")}


def threads() -> set[threading.Thread]:
    """The threads there are, but for the loop's own workers."""
    return {one for one in threading.enumerate() if not one.name.startswith("asyncio_")}


def within(seconds: float, done: Callable[[], bool]) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
    return done()


@pytest.fixture
def run(home: Path, service: ServiceClient) -> Iterator[loops.TrainingClient]:
    """A run on a connection of its own, which has what one caller at a time needs."""
    with ServiceClient(home=home) as client:
        run = client.create_lora_training_client(MODEL, LOOPS_RANK, seed=1)
        run.save_weights_and_get_sampling_client("light").result(timeout=60).sample([1], 1, ONE)
        yield run


def made(run: loops.TrainingClient) -> SamplingClient:
    """A new client of a new version, that has sampled."""
    client = run.save_weights_and_get_sampling_client("light").result(timeout=60)
    client.sample([1], 1, ONE)
    return client


def test_thirty_clients_made_and_closed(run: loops.TrainingClient) -> None:
    """Each is closed as a loop would do it: there are no more threads and sockets than with the first."""
    before, count = threads(), len(sockets())
    clients = [made(run) for _ in range(MANY)]
    assert threads() <= before
    assert len(sockets()) <= count + 2  # a publish and the sample behind it may overlap
    for client in clients:
        client.close()
    assert threads() <= before
    assert len(sockets()) <= count + 2


def test_thirty_clients_made_and_dropped(run: loops.TrainingClient) -> None:
    """Nothing keeps a client that nobody closed: it is collected, and has left nothing."""
    before, count = threads(), len(sockets())
    seen = [weakref.ref(made(run)) for _ in range(MANY)]
    idle()
    gc.collect()
    assert [one() for one in seen] == [None] * MANY
    assert threads() <= before
    assert len(sockets()) <= count + 2


def test_a_client_says_how_to_get_another_elsewhere(
    service: ServiceClient, tc: TrainingClient, run: loops.TrainingClient
) -> None:
    """No client can be pickled; the error names the call that makes its like in another process."""
    advice = {
        service: "make one over there",
        tc: r"service\.get_training_client\(id\)",
        run: r"service\.attach\(run_id\)",
        made(run): r"service\.create_sampling_client\(model_path=",
    }
    for client, call in advice.items():
        with pytest.raises(TypeError, match=call):
            pickle.dumps(client)


def test_thirty_services_made_and_closed(home: Path, service: ServiceClient) -> None:
    """A whole service closes its connections and gives its lease back; the shared server goes on."""
    process = server_of(home).process
    assert process is not None
    before, open_before, leases = threads(), sockets(), len(server_of(home)._leases)
    for _ in range(MANY):
        with ServiceClient(home=home) as client:
            assert client.get_server_capabilities().losses
    assert threads() <= before
    assert within(30.0, lambda: sockets() <= open_before)
    assert len(server_of(home)._leases) == leases
    assert process.alive()


def test_a_forgotten_service_ends_its_server(tmp_path: Path) -> None:
    """Its clients keep the server; with the last of them it ends, and a warning says where the service was made."""
    service = ServiceClient(home=tmp_path)
    run = service.create_lora_training_client(MODEL, LOOPS_RANK)
    process = server_of(tmp_path).process
    assert process is not None
    forgotten = weakref.ref(service)
    del service
    idle()
    gc.collect()
    assert forgotten() is None
    clients = [run]
    del run
    assert clients[0].policy_version == 0
    idle()
    with pytest.warns(ResourceWarning, match="test_light_clients.py"):
        clients.clear()
    assert within(30.0, process.ended.is_set)
    assert not server_of(tmp_path)._leases


async def test_a_forgotten_service_of_a_loop_gives_its_lease_back(home: Path, service: ServiceClient) -> None:
    """A client that lived on this loop and was never closed: its lease is gone, the shared server stays."""
    leases = len(server_of(home)._leases)
    clients = [await ServiceClient(home=home).__aenter__()]
    assert (await clients[0].get_server_capabilities_async()).losses
    assert len(server_of(home)._leases) == leases + 1
    with pytest.warns(ResourceWarning, match="unclosed ServiceClient"):
        clients.clear()
    async with asyncio.timeout(30.0):
        while len(server_of(home)._leases) > leases:
            await asyncio.sleep(0.02)
    assert (await service.get_server_capabilities_async()).losses


# ------------------------------------------------------------------------------------------------- trackers


class FakeRun:
    """A run on W&B."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.finished = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        assert not self.finished
        assert metrics["loss"] > 0
        self.steps.append(step)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    """The module ``wandb``, with one run."""
    run = FakeRun()

    def init(**fields: Any) -> FakeRun:
        assert fields == {"project": "p", "name": None}
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return run


def test_close_finishes_the_wandb_run(home: Path, service: ServiceClient, wandb: FakeRun) -> None:
    """Closing the run tells W&B of every step that is done, whoever waited for its passes, and finishes, once."""
    run = service.create_lora_training_client(MODEL, LOOPS_RANK, wandb_config=WandbConfig("p"))
    run.forward_backward([datum()])
    run.optim_step(AdamParams()).result(timeout=60)
    run.close()
    run.close()
    assert (wandb.steps, wandb.finished) == ([1], 1)


def test_closing_the_service_finishes_them_too(home: Path, service: ServiceClient, wandb: FakeRun) -> None:
    """A program that closes only its service has its W&B run finished."""
    with ServiceClient(home=home) as client:
        run = client.create_lora_training_client(MODEL, LOOPS_RANK, wandb_config=WandbConfig("p"))
        run.forward_backward([datum()])
        run.optim_step(AdamParams()).result(timeout=60)
        assert not wandb.finished
    assert (wandb.steps, wandb.finished) == ([1], 1)


async def test_aclose_finishes_the_wandb_run(home: Path, service: ServiceClient, wandb: FakeRun) -> None:
    """The awaitable end does the same."""
    async with ServiceClient(home=home) as client:
        run = await client.create_lora_training_client_async(MODEL, LOOPS_RANK, wandb_config=WandbConfig("p"))
        await run.forward_backward([datum()])
        await run.optim_step(AdamParams())
        await run.aclose()
        assert (wandb.steps, wandb.finished) == ([1], 1)
