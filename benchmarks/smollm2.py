"""SmolLM2-135M, the real model: the engine and the whole stack beside the PEFT loop and HF ``generate``.

Needs the folder that ``tg-tinker models fetch smollm2-135m`` makes. Two threads suit it on two idle cores.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs

from benchmarks import engine_sampling, engine_training, stack
from benchmarks.figures import Figure
from benchmarks.measure import Options
from benchmarks.models import RANK, smollm2_folder
from benchmarks.peers import PeerProcess
from tg_tinker.loops import ServiceClient

_GOALS = {1: 14.0, 16: 90.0, 32: 110.0}  # streams -> tokens/s


def run(options: Options) -> list[Figure]:
    """The engine first, then the stack."""
    folder = smollm2_folder()
    shapes = ((4, 128),) if options.quick else ((4, 128), (8, 256))
    figures = engine_training.compare(folder, options, shapes=shapes, rounds=3)
    figures += engine_sampling.compare(folder, options, streams=(1, 8, 32), rounds=3)
    engine = [attrs.evolve(figure, name=f"engine: {figure.name}") for figure in figures]
    with TemporaryDirectory() as home:
        whole = asyncio.run(_stack(folder, Path(home), options))
    return engine + [attrs.evolve(figure, name=f"stack: {figure.name}") for figure in whole]


async def _stack(folder: Path, home: Path, options: Options) -> list[Figure]:
    few = attrs.evolve(options, rounds_at_most=3)
    with PeerProcess(folder, options.threads) as peer:
        async with ServiceClient(home=home) as service:
            training = await service.create_lora_training_client_async(str(folder), rank=RANK)
            figures = await stack.training_rows(training, peer, few, goal=120.0)
            return figures + await stack.sampling_rows(training, peer, few, goals=_GOALS)
