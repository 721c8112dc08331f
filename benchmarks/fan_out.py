"""2000 samples asked for at once, of a stub that answers at once, beside hand-written aiohttp against the same stub.

256 prompt tokens go, 64 tokens with log probabilities come back. Each turn is a process of its own, so that CPU time
and memory are those of one side alone.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import quantiles
from time import perf_counter, process_time
from typing import Any

from benchmarks import stub_answers
from benchmarks.figures import Figure
from benchmarks.measure import Options, child, interleaved
from benchmarks.stub import StubProcess

SAMPLES = 2000
PROMPT = tuple(range(256))
_SEQUENTIAL = 300
_PEER = "aiohttp by hand"
_SIDES = ("ours", "aiohttp")
_FIGURES = {
    "requests_per_second": "samples/s",
    "cpu_ms": "CPU ms/sample",
    "p50_ms": "ms, p50 of the fan-out",
    "p99_ms": "ms, p99 of the fan-out",
    "one_by_one_ms": "ms, p50 one by one",
    "rss_mb": "MB peak RSS",
    "grown_mb": "MB RSS grown by the fan-out",
}


def run(options: Options) -> list[Figure]:
    """Run both sides in turn."""
    samples = 200 if options.quick else SAMPLES
    with StubProcess() as stub:
        sides = {side: partial(child, "benchmarks.fan_out", side, stub.url, samples) for side in _SIDES}
        taken = interleaved(sides, options.rounds(7))
    return [
        Figure(
            name=f"{samples} concurrent samples",
            unit=unit,
            ours=[one[key] for one in taken["ours"]],
            peer=_PEER,
            theirs=[one[key] for one in taken["aiohttp"]],
        )
        for key, unit in _FIGURES.items()
    ]


async def ours(url: str, samples: int) -> dict[str, float]:
    """Through the SDK, at home on this loop."""
    from tg_tinker import SamplingParams, ServiceClient

    async with ServiceClient(base_url=url, api_key="stub") as service:
        client = await service.create_sampling_client_async(base_model=stub_answers.MODEL)
        from tg_tinker import ModelInput

        prompt, params = ModelInput.from_ints(list(PROMPT)), SamplingParams(max_tokens=stub_answers.SAMPLED)

        async def one() -> None:
            response = await client.sample_async(prompt, 1, params)
            assert len(response.sequences[0].tokens) == stub_answers.SAMPLED

        return await _measured(one, samples)


async def by_hand(url: str, samples: int) -> dict[str, float]:
    """As one would write it with aiohttp and the standard library's JSON: bare dicts, no checks, no retries."""
    import aiohttp

    body = {"prompt": list(PROMPT), "n": 1, "max_tokens": stub_answers.SAMPLED, "temperature": 1.0, "logprobs": 0}

    async with aiohttp.ClientSession() as session:

        async def one() -> None:
            async with session.post(f"{url}/loops/samplers/{stub_answers.SAMPLER}/sample", json=body) as response:
                choice = (await response.json())["choices"][0]
                assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) == stub_answers.SAMPLED

        return await _measured(one, samples)


async def _measured(one: Callable[[], Awaitable[None]], samples: int) -> dict[str, float]:
    """One by one first, which warms up; then all at once."""
    singles = [await _timed(one) for _ in range(_SEQUENTIAL)]
    before, began, cpu = _peak_mb(), perf_counter(), process_time()
    latencies = await asyncio.gather(*(_timed(one) for _ in range(samples)))
    wall, cpu = perf_counter() - began, process_time() - cpu
    percentiles = quantiles(latencies, n=100)
    return {
        "requests_per_second": samples / wall,
        "cpu_ms": 1000 * cpu / samples,
        "p50_ms": 1000 * percentiles[49],
        "p99_ms": 1000 * percentiles[98],
        "one_by_one_ms": 1000 * quantiles(singles, n=2)[0],
        "rss_mb": _peak_mb(),
        "grown_mb": max(0.1, _peak_mb() - before),
    }


async def _timed(one: Callable[[], Awaitable[None]]) -> float:
    began = perf_counter()
    await one()
    return perf_counter() - began


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main(side: str, url: str, samples: str) -> dict[str, Any]:
    """One side's turn."""
    work = {"ours": ours, "aiohttp": by_hand}[side]
    return asyncio.run(work(url, int(samples)))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
