"""As engine_sampling, on a random GPT-NeoX: the engine has no pass of its own for it, and batches transformers'."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.engine_sampling import compare
from benchmarks.figures import Figure
from benchmarks.measure import Options
from benchmarks.models import make_neox


def run(options: Options) -> list[Figure]:
    """Measure the random model of 5.26 million parameters."""
    with TemporaryDirectory() as scratch:
        return compare(make_neox(Path(scratch)), options, streams=(1, 8, 32), rounds=9, goal=None)
