"""forward_backward of 64 datums x 2048 tokens against a stub: time, bytes, and how long the event loop stood still.

Tokens, targets and weights go; a log probability for each position comes back. By hand means numpy arrays through
orjson and aiohttp, all of it on the loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter, process_time

from benchmarks import stub_answers
from benchmarks.figures import Figure
from benchmarks.measure import Heartbeat, Options, child, interleaved
from benchmarks.stub import StubProcess

Turn = dict[str, float]

_CALLS = 12
_SIDES = ("ours", "by_hand")
_FIGURES = {
    "total": ("from call to result", "ms"),
    "cpu": ("client CPU", "CPU ms"),
    "call": ("until the call returns", "ms"),
    "stall": ("longest stall of the loop", "ms"),
}


def run(options: Options) -> list[Figure]:
    """Run both sides in turn, then count the bytes of each."""
    calls = 3 if options.quick else _CALLS
    with StubProcess() as stub:
        sides = {side: partial(child, "benchmarks.large_batch", side, stub.url, calls) for side in _SIDES}
        taken = interleaved(sides, options.rounds(5))
        moved = {side: _bytes_per_call(stub, work, calls) for side, work in sides.items()}
    name = f"forward_backward {stub_answers.ROWS} x {stub_answers.LENGTH}"
    times = [
        Figure(
            name=f"{name}, {title}",
            unit=unit,
            ours=[turn[key] for turn in taken["ours"]],
            peer="orjson + aiohttp by hand",
            theirs=[turn[key] for turn in taken["by_hand"]],
        )
        for key, (title, unit) in _FIGURES.items()
    ]
    sizes = [
        Figure(
            name=f"{name}, bytes {way}",
            unit="kB",
            ours=[moved["ours"][way] / 1000],
            peer="orjson + aiohttp by hand",
            theirs=[moved["by_hand"][way] / 1000],
        )
        for way in ("in", "out")
    ]
    return times + sizes


def _bytes_per_call(stub: StubProcess, work: Callable[[], object], calls: int) -> dict[str, float]:
    """What the stub took in and gave out for one call; set-up requests are small beside it."""
    before = stub.counts()
    work()
    after = stub.counts()
    return {way: (after[way] - before[way]) / (calls + 1) for way in ("in", "out")}


async def ours(url: str, calls: int) -> Turn:
    """Through the SDK, at home on this loop."""
    from benchmarks.stack import datums
    from tg_tinker.loops import ServiceClient, TensorData

    data = datums(stub_answers.ROWS, stub_answers.LENGTH)
    weights = TensorData([1.0] * stub_answers.LENGTH)
    for datum in data:
        assert isinstance(datum.loss_fn_inputs, dict)
        datum.loss_fn_inputs["weights"] = weights
    async with ServiceClient(base_url=url, api_key="stub") as service:
        training = await service.create_lora_training_client_async(stub_answers.MODEL, rank=8)

        async def once() -> float:
            begun = perf_counter()
            future = training.forward_backward(data)
            returned = perf_counter() - begun
            assert len((await future).loss_fn_outputs) == stub_answers.ROWS
            return returned

        return await _measured(once, calls)


async def by_hand(url: str, calls: int) -> Turn:
    """The same body and the same two requests."""
    import aiohttp
    import numpy as np
    import orjson

    shape = (stub_answers.ROWS, stub_answers.LENGTH)
    tokens, targets = np.random.default_rng().integers(4096, size=(2, *shape))
    weights = np.ones(stub_answers.LENGTH, np.float32)
    trainer = f"{url}/loops/trainers/{stub_answers.RUN}"

    def tensor(values: object, dtype: str) -> dict[str, object]:
        return {"data": values, "dtype": dtype, "shape": [stub_answers.LENGTH]}

    async with aiohttp.ClientSession() as session:

        async def once() -> float:
            begun = perf_counter()
            data = [
                {
                    "model_input": {"chunks": [{"type": "encoded_text", "tokens": row}]},
                    "loss_fn_inputs": {"target_tokens": tensor(target, "int64"), "weights": tensor(weights, "float32")},
                }
                for row, target in zip(tokens, targets, strict=True)
            ]
            body = orjson.dumps({"data": data, "loss_fn": "cross_entropy"}, option=orjson.OPT_SERIALIZE_NUMPY)
            returned = perf_counter() - begun
            async with session.post(f"{trainer}/forward_backward", data=body) as accepted:
                ticket = (await accepted.json())["operation_id"]
            async with session.get(f"{trainer}/operations/{ticket}?wait=30") as outcome:
                outputs = orjson.loads(await outcome.read())["result"]["loss_fn_outputs"]
            arrays = [np.array(one["logprobs"]["data"], np.float32) for one in outputs]
            assert len(arrays) == stub_answers.ROWS
            return returned

        return await _measured(once, calls)


async def _measured(once: Callable[[], Awaitable[float]], calls: int) -> Turn:
    """Mean over the calls, except for the stall: the median of each call's longest."""
    await once()
    returned, stalls, total = 0.0, list[float](), 0.0
    cpu = process_time()
    for _ in range(calls):
        async with Heartbeat() as beat:
            begun = perf_counter()
            returned += await once()
            total += perf_counter() - begun
        stalls.append(beat.stall)
    cpu = process_time() - cpu
    stall = sorted(stalls)[len(stalls) // 2]
    return {
        "total": 1e3 * total / calls,
        "cpu": 1e3 * cpu / calls,
        "call": 1e3 * returned / calls,
        "stall": 1e3 * stall,
    }


def main(side: str, url: str, calls: str) -> Turn:
    """One side's turn."""
    return asyncio.run({"ours": ours, "by_hand": by_hand}[side](url, int(calls)))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
