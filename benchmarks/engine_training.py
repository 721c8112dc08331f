"""The engine's training beside a hand-written PEFT loop: same model, same process rules, no server.

Wall time says what a user waits for; tokens per CPU second hardly move when somebody else wants the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.engine_side import EngineSide
from benchmarks.figures import Figure, Goal, throughput
from benchmarks.measure import Cost, Options, interleaved
from benchmarks.models import make_small
from benchmarks.peers import PeerProcess

PEER = "PEFT loop"
_SHAPES = ((8, 128), (8, 256))


def run(options: Options) -> list[Figure]:
    """Measure the random model of 6.8 million parameters."""
    with TemporaryDirectory() as scratch:
        return compare(make_small(Path(scratch)), options, shapes=_SHAPES, rounds=15)


def compare(folder: Path, options: Options, *, shapes: Sequence[tuple[int, int]], rounds: int) -> list[Figure]:
    """Time forward_backward of each shape (rows, tokens), then the optimizer step, on both sides in turn."""
    figures: list[Figure] = []
    engine = EngineSide(folder, options.threads)
    with PeerProcess(folder, options.threads) as peer:
        for shape in shapes:
            sides = {
                "ours": partial(_step_of, engine.train, engine.optim, shape),
                "theirs": partial(_step_of, partial(peer, "train"), partial(peer, "optim"), shape),
            }
            taken = interleaved(sides, options.rounds(rounds), warm_up=2)
            (ours, our_steps), (theirs, their_steps) = (zip(*taken[side], strict=True) for side in sides)
            title = f"{shape[0]} x {shape[1]}"
            tokens = [shape[0] * shape[1]] * len(ours)
            figures += throughput(f"forward_backward {title}", tokens, ours, PEER, theirs, Goal(">=", 1.0, "ratio"))
            figures.append(_step(f"optim_step after {title}", our_steps, their_steps))
    return figures


def _step_of(train: Callable[[int, int], Cost], optim: Callable[[], Cost], shape: tuple[int, int]) -> tuple[Cost, Cost]:
    return train(*shape), optim()


def _step(name: str, ours: Sequence[Cost], theirs: Sequence[Cost]) -> Figure:
    milliseconds, peer = [1000 * one.wall for one in ours], [1000 * one.wall for one in theirs]
    return Figure(name=name, unit="ms", ours=milliseconds, peer=f"{PEER}, fused AdamW", theirs=peer)
