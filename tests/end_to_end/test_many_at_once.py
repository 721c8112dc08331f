"""Many callers at once: threads, loops and tasks on one client, and sampling beside training."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fixtures.programs import BATCH, LOOPS_RANK, MODEL, datum, tg_config

from tg_tinker import AdamParams, InvalidRequestError, SamplingParams, ServiceClient, TrainingClient, loops

pytestmark = pytest.mark.timeout(240)
STEP = AdamParams(learning_rate=1e-3)


async def test_sixty_four_samples_at_once(home: Path) -> None:
    """64 concurrent samples come back whole, each as it would have been alone."""
    async with ServiceClient(home=home) as service:
        run = await service.create_lora_training_client_async(MODEL, LOOPS_RANK, seed=1)
        sampler = await run.save_weights_and_get_sampling_client_async("many")

        def ask(seed: int) -> SamplingParams:
            return SamplingParams(max_tokens=12, seed=seed)

        together = await asyncio.gather(*(sampler.sample_async([72, seed], 1, ask(seed)) for seed in range(64)))
        assert len({answer.sequences[0].tokens for answer in together}) > 32
        for seed in (0, 31, 63):
            alone = await sampler.sample_async([72, seed], 1, ask(seed))
            assert alone.sequences[0].tokens == together[seed].sequences[0].tokens


async def test_sixty_four_tg_samples_at_once(home: Path) -> None:
    """The run's own ``sample_async`` takes 64 callers as well; all see the weights of the step before."""
    async with ServiceClient(home=home) as service:
        tc = await service.create_training_client_async(tg_config())
        await tc.forward_backward(BATCH)
        await tc.optim_step()
        answers = await asyncio.gather(*(tc.sample_async("Hello", max_tokens=12, seed=seed) for seed in range(64)))
        assert {answer.model_step for answer in answers} == {1}
        assert len({answer.samples[0].completion for answer in answers}) > 32


def test_threads_and_loops_share_one_client(service: ServiceClient) -> None:
    """Three threads that block and two loops that await use one run; every operation is counted exactly once."""
    run = service.create_lora_training_client(MODEL, LOOPS_RANK, seed=1)
    rounds, refused = 6, []

    @contextmanager
    def perhaps_refused() -> Iterator[None]:
        try:
            yield
        except InvalidRequestError as error:  # another thread's step took the gradient along
            refused.append(error.field)

    def blocking() -> None:
        for _ in range(rounds):
            run.forward_backward([datum()]).result(timeout=100)
            with perhaps_refused():
                run.optim_step(STEP).result(timeout=100)

    async def awaiting() -> None:
        for _ in range(rounds):
            await run.forward_backward([datum()])
            with perhaps_refused():
                await (await run.optim_step_async(STEP))

    works: list[Callable[[], None]] = [blocking] * 3 + [lambda: asyncio.run(awaiting())] * 2
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result(timeout=200)
    assert set(refused) <= {"optim_step"}
    assert run.policy_version == 5 * rounds - len(refused)


def test_operations_keep_the_order_of_their_calls(tc: TrainingClient) -> None:
    """Calls from many threads are executed one after the other; passes and steps alternate as they were called."""
    lock = threading.Lock()

    def one_step(_: int) -> int:
        with lock:  # the pair is one thread's own; without the lock another pair could come between
            tc.forward_backward(BATCH)
            future = tc.optim_step()
        return future.result(timeout=100).step

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(one_step, range(24))) == list(range(1, 25))
    assert tc.step == 24


def test_a_stream_goes_on_while_the_run_trains(tc: TrainingClient) -> None:
    """Between the chunks of a stream the run takes steps; the stream keeps the weights it started with."""
    stream = tc.sample_stream("Hello", max_tokens=200, temperature=0.0)
    first = next(stream)
    for _ in range(5):
        tc.forward_backward(BATCH)
    step = tc.optim_step().result(timeout=100)
    text = first.text + "".join(chunk.text for chunk in stream)
    assert step.step == 1
    assert text != tc.sample("Hello", max_tokens=200, temperature=0.0).samples[0].completion


def test_a_short_sample_overtakes_a_long_one(tc: TrainingClient) -> None:
    """A short completion asked for later is there before a long one is done."""
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(tc.sample, "Hello", max_tokens=1900, stop_sequences=None, seed=1, num_completions=8)
        time.sleep(0.3)
        tc.sample("Hello", max_tokens=2)
        overtaken = not long.done()
        long.result(timeout=200)
    assert overtaken


async def test_two_loops_use_one_client(service: ServiceClient) -> None:
    """A plain client is used from this loop and from one in another thread at the same time."""
    run = await service.create_lora_training_client_async(MODEL, LOOPS_RANK, seed=1)

    async def use() -> float:
        return (await run.forward([datum()])).loss

    elsewhere = asyncio.to_thread(lambda: asyncio.run(use()))
    here, there = await asyncio.gather(use(), elsewhere)
    assert here == there


def test_loops_and_tg_runs_train_side_by_side(service: ServiceClient, tc: TrainingClient) -> None:
    """Runs of both surfaces on one base model do not touch each other's weights."""
    run = service.create_lora_training_client(MODEL, LOOPS_RANK, seed=1)
    untouched: loops.ForwardBackwardOutput = run.forward([datum()]).result(timeout=60)
    steps = [tc.optim_step() for _ in range(3) if tc.forward_backward(BATCH)]
    assert steps[-1].result(timeout=60).step == 3
    assert run.forward([datum()]).result(timeout=60).loss == untouched.loss
