"""Import time as a ratio to ``import aiohttp``, each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.figures import Figure
from benchmarks.measure import Options, environment, interleaved

_NAMES = "from tg_tinker import BatchData, LoRAConfig, ServiceClient, TrainingClient, TrainingConfig"
_LOOPS = "from tg_tinker.loops import AdamParams, Datum, ModelInput, ServiceClient, TrainingClient"


def run(options: Options) -> list[Figure]:
    """Time the bare import, and the imports that programs of both surfaces begin with."""
    statements = {
        "aiohttp": "import aiohttp",
        "bare": "import tg_tinker",
        "names": _NAMES,
        "loops": _LOOPS,
    }
    sides = {name: partial(milliseconds, statement) for name, statement in statements.items()}
    taken = interleaved(sides, options.rounds(11))
    shown = {
        "bare": "import tg_tinker",
        "names": "from tg_tinker import ServiceClient, ...",
        "loops": "from tg_tinker.loops import ServiceClient, ...",
    }
    return [
        Figure(name=title, unit="ms", ours=taken[side], peer="import aiohttp", theirs=taken["aiohttp"])
        for side, title in shown.items()
    ]


def milliseconds(statement: str) -> float:
    """How long ``statement`` takes in an interpreter that has imported nothing else."""
    program = f"import time; begun = time.perf_counter(); {statement}; print(time.perf_counter() - begun)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment(), timeout=120)
    return 1000 * float(done.stdout)
