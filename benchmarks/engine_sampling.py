"""The engine's sampling beside Hugging Face ``generate``: same model, 1, 8 and 32 streams of 64 new tokens, no server.

Ours samples with the run's adapter and reports a log probability for each token; ``generate`` runs the bare model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.engine_side import EngineSide
from benchmarks.figures import Figure, Goal, throughput
from benchmarks.measure import Options, interleaved
from benchmarks.models import make_small
from benchmarks.peers import PeerProcess

_PEER = "HF generate"
_GOAL = Goal(">=", 1.0, "ratio")
_PROMPT, _NEW = 32, 64  # tokens


def run(options: Options) -> list[Figure]:
    """Measure the random model of 6.8 million parameters."""
    with TemporaryDirectory() as scratch:
        return compare(make_small(Path(scratch)), options, streams=(1, 8, 32), rounds=9)


def compare(
    folder: Path, options: Options, *, streams: Sequence[int], rounds: int, goal: Goal | None = _GOAL
) -> list[Figure]:
    """Sample with so many streams at once on both sides in turn."""
    figures: list[Figure] = []
    engine = EngineSide(folder, options.threads)
    with PeerProcess(folder, options.threads) as peer:
        for count in streams:
            shape = (count, _PROMPT, _NEW)
            sides = {"ours": partial(engine.generate, *shape), "theirs": partial(peer, "generate", *shape)}
            taken = interleaved(sides, options.rounds(rounds))
            tokens = [count * _NEW] * len(taken["ours"])
            name = f"sampling, {count} stream{'s' * (count > 1)}"
            figures += throughput(name, tokens, taken["ours"], _PEER, taken["theirs"], goal)
    return figures
