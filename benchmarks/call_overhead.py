"""What one call costs, face by face, against a stub that answers at once, beside the same requests by hand.

A long operation is two requests (submit, outcome), a sample is one. p50 is what a caller waits; CPU time is that of
the client's process, bridge thread included.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import ChainMap
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import median
from time import perf_counter, process_time
from typing import Any

from benchmarks import stub_answers
from benchmarks.fan_out import PROMPT
from benchmarks.figures import Figure
from benchmarks.measure import Options, child, interleaved
from benchmarks.stub import StubProcess

Times = dict[str, tuple[float, float]]  # face -> p50 of the wait (ms), CPU per call (ms)

_CALLS = 300
_BATCH = {"input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]]}
_BY_HAND = {"operation": "operation by hand", "sample": "sample by hand"}
_FACES = {
    "future": ("fb(batch).result()", "operation"),
    "await future": ("await fb(batch), own loop", "operation"),
    "twin": ("await (await fb_async(batch)), own loop", "operation"),
    "twin across": ("await (await fb_async(batch)), other loop", "operation"),
    "blocking": ("sampler.sample(...)", "sample"),
    "blocking twin": ("await sampler.sample_async(...), own loop", "sample"),
}


def run(options: Options) -> list[Figure]:
    """Let the SDK's faces and the handwritten requests take turns."""
    calls = 50 if options.quick else _CALLS
    modes = ("plain", "own_loop", "other_loop", "by_hand")
    with StubProcess() as stub:
        sides = {mode: partial(child, "benchmarks.call_overhead", mode, stub.url, calls) for mode in modes}
        taken = interleaved(sides, options.rounds(5))
    turns: list[Times] = [dict(ChainMap(*turn)) for turn in zip(*(taken[mode] for mode in modes), strict=True)]
    return [
        Figure(
            name=title,
            unit=unit,
            ours=[turn[face][column] for turn in turns],
            peer="aiohttp by hand",
            theirs=[turn[_BY_HAND[kind]][column] for turn in turns],
        )
        for face, (title, kind) in _FACES.items()
        for column, unit in enumerate(("ms, p50", "CPU ms"))
    ]


def plain(url: str, calls: int) -> Times:
    """A script without a loop: everything crosses to the bridge thread."""
    from tg_tinker import ServiceClient

    with ServiceClient(base_url=url, api_key="stub") as service:
        training = service.create_training_client({"model_ref": stub_answers.MODEL})
        sampler = service.create_sampling_client(base_model=stub_answers.MODEL)
        return {
            "future": _timed(lambda: training.forward_backward(_BATCH).result(), calls),
            "blocking": _timed(lambda: sampler.sample(PROMPT), calls),
        }


async def own_loop(url: str, calls: int) -> Times:
    """``async with``: the client lives on this loop."""
    from tg_tinker import ServiceClient

    async with ServiceClient(base_url=url, api_key="stub") as service:
        training = await service.create_training_client_async({"model_ref": stub_answers.MODEL})
        sampler = await service.create_sampling_client_async(base_model=stub_answers.MODEL)

        async def twin() -> None:
            await (await training.forward_backward_async(_BATCH))

        async def future() -> None:
            await training.forward_backward(_BATCH)

        return {
            "await future": await _timed_async(future, calls),
            "twin": await _timed_async(twin, calls),
            "blocking twin": await _timed_async(lambda: sampler.sample_async(PROMPT), calls),
        }


async def other_loop(url: str, calls: int) -> Times:
    """A client used plainly, from coroutines: its home is the bridge thread, and each await hops."""
    from tg_tinker import ServiceClient

    service = ServiceClient(base_url=url, api_key="stub")
    training = await service.create_training_client_async({"model_ref": stub_answers.MODEL})

    async def twin() -> None:
        await (await training.forward_backward_async(_BATCH))

    try:
        return {"twin across": await _timed_async(twin, calls)}
    finally:
        await service.aclose()


async def by_hand(url: str, calls: int) -> Times:
    """The same requests with aiohttp and the standard library's JSON."""
    import aiohttp

    async with aiohttp.ClientSession() as session:

        async def operation() -> None:
            path = f"{url}/v1/training_clients/{stub_answers.RUN}/forward_backward"
            async with session.post(path, json={"batch": _BATCH}) as accepted:
                ticket = (await accepted.json())["future_id"]
            async with session.get(f"{url}/v1/futures/{ticket}/result?wait=30") as outcome:
                assert (await outcome.json())["result"]["num_tokens"] == 8

        async def sample() -> None:
            path = f"{url}/loops/samplers/{stub_answers.SAMPLER}/sample"
            async with session.post(path, json={"prompt": PROMPT, "n": 1, "temperature": 1.0, "logprobs": 0}) as answer:
                assert len((await answer.json())["choices"][0]["token_ids"]) == stub_answers.SAMPLED

        return {
            "operation by hand": await _timed_async(operation, calls),
            "sample by hand": await _timed_async(sample, calls),
        }


def _timed(work: Callable[[], object], calls: int) -> tuple[float, float]:
    for _ in range(calls // 3):
        work()
    waits, cpu = list[float](), process_time()
    for _ in range(calls):
        begun = perf_counter()
        work()
        waits.append(perf_counter() - begun)
    return 1000 * median(waits), 1000 * (process_time() - cpu) / calls


async def _timed_async(work: Callable[[], Awaitable[object]], calls: int) -> tuple[float, float]:
    for _ in range(calls // 3):
        await work()
    waits, cpu = list[float](), process_time()
    for _ in range(calls):
        begun = perf_counter()
        await work()
        waits.append(perf_counter() - begun)
    return 1000 * median(waits), 1000 * (process_time() - cpu) / calls


def main(mode: str, url: str, calls: str) -> Any:
    """One mode's turn."""
    if mode == "plain":
        return plain(url, int(calls))
    work = {"own_loop": own_loop, "other_loop": other_loop, "by_hand": by_hand}[mode]
    return asyncio.run(work(url, int(calls)))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
