"""Three blocking threads and two event loops torment one client for a while; nothing hangs, and all of it adds up.

``TG_TINKER_TORTURE_SECONDS`` says for how long: half a minute here, ten minutes by hand before a release.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fixtures.ledger import Ledger
from fixtures.processes import open_files
from fixtures.programs import LOOPS_RANK, MODEL, datum

from tg_tinker import AdamParams, OperationFuture, SamplingClient, SamplingParams, ServiceClient, loops
from tg_tinker.errors import OperationFailedError

SECONDS = float(os.environ.get("TG_TINKER_TORTURE_SECONDS", "30"))
PATIENCE = 60.0  # seconds after which something that should have ended counts as hanging
STEP = AdamParams(learning_rate=1e-4)
PROMPT = [72, 101, 108]
AT_HAND = 12  # futures that a caller leaves open before it looks at the oldest
NEEDED = {
    "forward", "forward_backward", "optim_step", "save_state", "save_weights_for_sampler",
    "save_weights_and_get_sampling_client", "samples", "scores", "timeouts", "left samples", "listings",
}  # fmt: skip

pytestmark = pytest.mark.timeout(SECONDS + 200)


class Caller:
    """What all callers do alike: submit operations, in this thread or on this loop, and keep their futures."""

    def __init__(self, run: loops.TrainingClient, ledger: Ledger, pins: deque[SamplingClient], seed: int) -> None:
        self.run = run
        self.ledger = ledger
        self.pins = pins
        self.random = random.Random(seed)
        self.open: deque[tuple[OperationFuture[Any], bool | None]] = deque()
        self.until = time.monotonic() + SECONDS

    def submit(self) -> OperationFuture[Any]:
        """Any long operation; on a loop its acceptance is not waited for."""
        run, name = self.run, f"name-{self.random.randrange(3)}"
        kinds: list[Callable[[], OperationFuture[Any]]] = [
            lambda: run.forward([datum()]),
            lambda: run.forward_backward([datum()]),
            lambda: run.forward_backward([datum()]),
            lambda: run.optim_step(STEP),
            lambda: run.optim_step(STEP),
            lambda: run.save_state(name),
            lambda: run.save_weights_for_sampler(name),
            lambda: run.save_weights_and_get_sampling_client("pinned"),
        ]
        return self.random.choice(kinds)()

    def pin(self) -> SamplingClient:
        """One of the newest pinned clients."""
        return self.random.choice(list(self.pins))

    def closed(self, future: OperationFuture[Any], cancelled: bool | None) -> None:
        """Enter a settled future; what it published is sampled from by everybody."""
        self.ledger.ended(future, cancelled=cancelled)
        if future.operation == "save_weights_and_get_sampling_client" and future.is_success():
            self.pins.append(future.result())

    def sampled(self, pin: SamplingClient, answer: loops.SampleResponse) -> None:
        """A pinned client is served by its own version, whole."""
        assert answer.policy_version == pin.min_policy_version
        assert len(answer.sequences) == 2
        assert all(len(one.tokens) == len(one.logprobs or ()) for one in answer.sequences)
        assert all(len(one.tokens) == 4 or one.stop_reason == "stop" for one in answer.sequences)
        self.ledger.count("samples")

    def scored(self, pin: SamplingClient, scores: list[float | None]) -> None:
        """A version scores as it did before."""
        assert scores[0] is None
        self.ledger.scored(pin.min_policy_version or 0, sum(score or 0.0 for score in scores))
        self.ledger.count("scores")

    def params(self) -> SamplingParams:
        """Four tokens, unless the model ends the text before."""
        return SamplingParams(max_tokens=4, seed=self.random.randrange(1000))


class Blocking(Caller):
    """Works in a thread."""

    def submit(self) -> OperationFuture[Any]:
        """As on a loop; a step that is not sent, because its pass was withdrawn in time, says so here."""
        while True:
            try:
                return super().submit()
            except OperationFailedError as error:
                self.ledger.not_sent(error)

    def work(self) -> None:
        """Do one thing after the other until the time is up, then see every future settled."""
        actions = [self.train, self.train, self.cancel, self.wait_too_little, self.sample, self.score, self.look]
        while time.monotonic() < self.until:
            self.random.choice(actions)()
            while len(self.open) > AT_HAND:
                self.close_one()
        while self.open:
            self.close_one()

    def close_one(self) -> None:
        """See the oldest future settled."""
        future, cancelled = self.open.popleft()
        future.exception(timeout=PATIENCE)
        self.closed(future, cancelled)

    def train(self) -> None:
        """Submit something."""
        self.open.append((self.submit(), None))

    def cancel(self) -> None:
        """Submit something and take it back, which may be too late."""
        future = self.submit()
        self.open.append((future, future.cancel()))

    def wait_too_little(self) -> None:
        """A wait that ends early leaves the future as it was."""
        future = self.submit()
        try:
            future.exception(timeout=0.0005)
        except TimeoutError as error:
            self.ledger.timed_out(error)
        self.open.append((future, None))

    def sample(self) -> None:
        """Sample from a pinned version."""
        pin = self.pin()
        self.sampled(pin, pin.sample(PROMPT, 2, self.params()))

    def score(self) -> None:
        """Score with a pinned version."""
        pin = self.pin()
        self.scored(pin, pin.compute_logprobs(PROMPT))

    def look(self) -> None:
        """Small requests go between."""
        self.run.health()
        assert self.run.policy_version >= 0
        assert self.run.list_checkpoints()
        self.ledger.count("listings")


class Awaiting(Caller):
    """Works on a loop of its own, several things at a time."""

    async def work(self) -> None:
        """As ``Blocking``, three at a time."""
        await asyncio.gather(*(self.one_after_the_other() for _ in range(3)))
        while self.open:
            await self.close_one()

    async def one_after_the_other(self) -> None:
        """Do one thing after the other until the time is up."""
        actions: list[Callable[[], Awaitable[None]]] = [
            self.train, self.cancel, self.wait_too_little, self.sample, self.score, self.leave, self.look,
        ]  # fmt: skip
        while time.monotonic() < self.until:
            await self.random.choice(actions)()
            while len(self.open) > AT_HAND:
                await self.close_one()

    async def close_one(self) -> None:
        """See the oldest future settled."""
        future, cancelled = self.open.popleft()
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait([asyncio.ensure_future(self.settled(future))])
        self.closed(future, cancelled)

    async def settled(self, future: OperationFuture[Any]) -> None:
        """Wait, whatever comes of it."""
        await asyncio.gather(future.result_async(), return_exceptions=True)

    async def train(self) -> None:
        """Submit something, or await its acceptance first."""
        self.open.append((self.submit(), None))
        self.open.append((await self.run.forward_async([datum()]), None))

    async def cancel(self) -> None:
        """Submit something and take it back, which may be too late."""
        future = self.submit()
        self.open.append((future, await future.cancel_async()))

    async def wait_too_little(self) -> None:
        """A cancelled wait, or one that timed out, leaves the future as it was."""
        future = self.submit()
        try:
            async with asyncio.timeout(0.0005):
                await self.settled(future)
        except TimeoutError as error:
            self.ledger.timed_out(error)
        self.open.append((future, None))

    async def sample(self) -> None:
        """Sample from a pinned version."""
        pin = self.pin()
        self.sampled(pin, await pin.sample_async(PROMPT, 2, self.params()))

    async def score(self) -> None:
        """Score with a pinned version."""
        pin = self.pin()
        self.scored(pin, await pin.compute_logprobs_async(PROMPT))

    async def leave(self) -> None:
        """Walk away from a long sample: nobody else may notice."""
        task = asyncio.ensure_future(self.pin().sample_async(PROMPT, 2, SamplingParams(max_tokens=500)))
        await asyncio.sleep(self.random.random() / 50)
        left = task.cancel()  # False where the model ended its text at once
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() == left
        self.ledger.count("left samples")

    async def look(self) -> None:
        """Small requests go between."""
        await asyncio.gather(self.run.health_async(), self.run.policy_version_async())
        assert await self.run.list_checkpoints_async()
        self.ledger.count("listings")


def gone(left: Callable[[], set[Any]]) -> set[Any]:
    """What is still left after a while."""
    deadline = time.monotonic() + PATIENCE
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    return left()


def test_threads_and_loops_torment_one_client(home: Path, service: ServiceClient) -> None:
    """Every future ends as it said, every step and version is counted once, and no thread, file or task is left."""
    service.get_server_capabilities()
    threads, files = set(threading.enumerate()), open_files()
    ledger, seed = Ledger(), random.randrange(10**6)
    print(f"torture of {SECONDS:g} s, seed {seed}")
    with ServiceClient(home=home) as client:
        run = client.create_lora_training_client(MODEL, LOOPS_RANK, seed=1)
        run.save_state("name-0").result(PATIENCE)
        first = run.save_weights_and_get_sampling_client("pinned")
        pins = deque([first.result(PATIENCE)], maxlen=5)
        ledger.ended(first, cancelled=None)
        blocking = [Blocking(run, ledger, pins, seed + number) for number in range(3)]
        awaiting = [Awaiting(run, ledger, pins, seed + number) for number in range(3, 5)]
        with ThreadPoolExecutor(5) as pool:
            works = [pool.submit(one.work) for one in blocking]
            works += [pool.submit(lambda one=one: asyncio.run(one.work())) for one in awaiting]
            for work in works:
                work.result(timeout=SECONDS + 3 * PATIENCE)
        print(dict(sorted(ledger.done.items())))
        assert sorted(ledger.steps) == list(range(1, len(ledger.steps) + 1))
        assert run.policy_version == len(ledger.steps)
        assert sorted(ledger.versions) == list(range(1, len(ledger.versions) + 1))
        last = run.save_weights_and_get_sampling_client("pinned").result(PATIENCE)
        wanted = run.forward([datum(*PROMPT)]).result(PATIENCE).loss_fn_outputs[0]["logprobs"].tolist()
        assert last.compute_logprobs(PROMPT)[1:] == pytest.approx(wanted[:-1], abs=1e-3)
        assert NEEDED - ledger.done.keys() == set()
    assert (
        gone(lambda: {one for one in threading.enumerate() if not one.name.startswith("asyncio_")} - threads) == set()
    )
    assert gone(lambda: open_files() - files) == set()
