"""The whole stack (client, HTTP, server, engine) on the random 6.8M model, beside a PEFT loop and HF ``generate``.

LoRA rank 8, 8 x 128 tokens a pass; sampling with 32 prompt tokens and 64 new ones. The peers run in a process of
their own without any server, so a ratio of 1 means that the stack costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np

from benchmarks.figures import Figure, Goal, throughput
from benchmarks.measure import Cost, Options
from benchmarks.models import RANK, VOCABULARY, make_small
from benchmarks.peers import PeerProcess
from benchmarks.server_cost import ServerCost
from tg_tinker.loops import (
    AdamParams,
    Datum,
    ModelInput,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TensorData,
    TrainingClient,
)

ROWS, LENGTH = 8, 128
TINY = "tg-tinker/tiny"
PROMPT, NEW = 32, 64  # tokens
_STEP = AdamParams(learning_rate=1e-4)
_PIPELINED = 8  # steps that are on their way at once
_LEAST_TOKEN = 300  # below are bytes and special tokens


def run(options: Options) -> list[Figure]:
    """Start servers, then measure one of them."""
    with TemporaryDirectory() as scratch:
        folder = make_small(Path(scratch) / "model")
        return asyncio.run(_run(folder, Path(scratch) / "home", options))


async def _run(folder: Path, home: Path, options: Options) -> list[Figure]:
    figures = await starting(folder, home, options)
    with PeerProcess(folder, options.threads) as peer:
        async with ServiceClient(home=home) as service:
            training = await service.create_lora_training_client_async(str(folder), rank=RANK)
            figures += await training_rows(training, peer, options, goal=1800)
            figures += await pipelined_row(training, peer, options)
            figures += await sampling_rows(training, peer, options, goals={1: 180, 16: 800, 64: 1400})
            figures += await short_beside_long(training, options)
            figures += await publishing_row(service, options)
            memory = ServerCost().memory_mb()
            figures.append(Figure(name="server, memory at the end", unit="MB RSS", ours=[memory]))
    return figures


async def starting(folder: Path, home: Path, options: Options) -> list[Figure]:
    """From nothing: a server, then a run on it that could train."""
    answers, ready, cpu = list[float](), list[float](), list[float]()
    for _ in range(options.rounds(3)):
        begun = perf_counter()
        async with ServiceClient(home=home) as service:
            await service.list_training_clients_async()
            answers.append(perf_counter() - begun)
            await service.create_lora_training_client_async(str(folder), rank=RANK)
            ready.append(perf_counter() - begun)
            cpu.append(ServerCost().server_cpu())
    return [
        Figure(name="start: the server answers", unit="s", ours=answers),
        Figure(name="start: a run is ready to train", unit="s", ours=ready, goal=Goal("<=", 6.0)),
        Figure(name="start: CPU time of the server until then", unit="CPU s", ours=cpu),
    ]


async def training_rows(training: TrainingClient, peer: PeerProcess, options: Options, *, goal: float) -> list[Figure]:
    """forward_backward and optim_step one after the other, each round of ours followed by one of the peer's."""
    server = ServerCost()
    passes, steps, peer_passes, peer_steps = list[Cost](), list[float](), list[Cost](), list[float]()
    for _ in range(options.rounds(15) + 2):
        passes.append(await server.of(training.forward_backward(datums())))
        steps.append(1000 * (await server.of(training.optim_step(_STEP))).wall)
        peer_passes.append(peer("train", ROWS, LENGTH))
        peer_steps.append(1000 * peer("optim").wall)
    name, tokens = f"forward_backward {ROWS} x {LENGTH}", [ROWS * LENGTH] * len(passes[2:])
    step = Figure(
        name="optim_step", unit="ms", ours=steps[2:], peer="PEFT loop", theirs=peer_steps[2:], goal=Goal("<=", 10.0)
    )
    return [*throughput(name, tokens, passes[2:], "PEFT loop", peer_passes[2:], Goal(">=", goal)), step]


async def pipelined_row(training: TrainingClient, peer: PeerProcess, options: Options) -> list[Figure]:
    """Several steps on their way at once: the server should never wait for the client."""
    ours, theirs = list[float](), list[float]()
    for _ in range(options.rounds(5) + 1):
        ours.append(1000 * await _pipeline(training, datums()))
        theirs.append(1000 * (peer("train", ROWS, LENGTH).wall + peer("optim").wall))
    name = f"forward_backward + optim_step, {_PIPELINED} of them on their way at once"
    return [Figure(name=name, unit="ms each", ours=ours[1:], peer="PEFT loop", theirs=theirs[1:])]


async def sampling_rows(
    training: TrainingClient, peer: PeerProcess, options: Options, *, goals: dict[int, float]
) -> list[Figure]:
    """Publish, then sample with as many requests at once as the goals name."""
    server = ServerCost()
    figures, publishing = list[Figure](), list[float]()
    for streams, goal in goals.items():
        ours, theirs, tokens = list[Cost](), list[Cost](), list[int]()
        for _ in range(options.rounds(7) + 1):
            begun = perf_counter()
            sampler = await training.save_weights_and_get_sampling_client_async(name="bench")
            publishing.append(1000 * (perf_counter() - begun))
            replies = asyncio.gather(*(_sample(sampler, NEW) for _ in range(streams)))
            ours.append(await server.of(replies))
            tokens.append(sum(replies.result()))
            spent = peer("generate", streams, PROMPT, NEW)
            share = tokens[-1] / (streams * NEW)  # a random model may end a text early; ``generate`` was told not to
            theirs.append(Cost(spent.wall * share, spent.cpu * share))
        name = f"sampling, {streams} stream{'s' * (streams > 1)}"
        figures += throughput(name, tokens[1:], ours[1:], "HF generate", theirs[1:], Goal(">=", goal))
    return [Figure(name="save_weights_and_get_sampling_client", unit="ms", ours=publishing[1:]), *figures]


async def short_beside_long(training: TrainingClient, options: Options) -> list[Figure]:
    """An 8-token request at the same time as a 512-token one, and half a second after it."""
    sampler = await training.save_weights_and_get_sampling_client_async(name="bench")
    together, later = list[float](), list[float]()
    for delay, taken in ((0.0, together), (0.5, later)):
        for _ in range(options.rounds(7)):
            long = asyncio.create_task(_sample(sampler, 512))
            await asyncio.sleep(delay)
            begun = perf_counter()
            await _sample(sampler, 8)
            taken.append(perf_counter() - begun)
            await long
    goal = Goal("<=", 0.5)
    return [
        Figure(name="8 tokens beside 512", unit="s", ours=together, goal=goal),
        Figure(name="8 tokens, 0.5 s after 512", unit="s", ours=later, goal=goal),
    ]


async def publishing_row(service: ServiceClient, options: Options) -> list[Figure]:
    """Publish the tiny model's adapter, wait for the version, sample one token from it."""
    training = await service.create_lora_training_client_async(TINY, rank=RANK)
    taken = list[float]()
    for _ in range(options.rounds(15) + 1):
        begun = perf_counter()
        sampler = await training.save_weights_and_get_sampling_client_async(name="bench")
        await sampler.sample_async(ModelInput.from_ints([1, 2, 3]), 1, SamplingParams(max_tokens=1))
        taken.append(1000 * (perf_counter() - begun))
    name = f"{TINY}: publish, then a first pinned sample"
    return [Figure(name=name, unit="ms", ours=taken[1:], goal=Goal("<=", 50.0))]


async def _sample(sampler: SamplingClient, new: int) -> int:
    prompt = np.random.default_rng().integers(_LEAST_TOKEN, VOCABULARY, size=PROMPT)
    response = await sampler.sample_async(ModelInput.from_ints(prompt), 1, SamplingParams(max_tokens=new))
    return len(response.sequences[0].tokens)


def datums(rows: int = ROWS, length: int = LENGTH) -> list[Datum]:
    """Random tokens that predict random tokens."""
    rng = np.random.default_rng()
    return [
        Datum(
            ModelInput.from_ints(rng.integers(_LEAST_TOKEN, VOCABULARY, size=length)),
            {"target_tokens": TensorData(rng.integers(_LEAST_TOKEN, VOCABULARY, size=length), "int64")},
        )
        for _ in range(rows)
    ]


async def _pipeline(training: TrainingClient, data: Sequence[Datum]) -> float:
    begun = perf_counter()
    futures: list[Awaitable[object]] = []
    for _ in range(_PIPELINED):
        futures += [training.forward_backward(data), training.optim_step(_STEP)]
    await asyncio.gather(*futures)
    return (perf_counter() - begun) / _PIPELINED
