"""Judge a request against model and loss before any device work: every fault found is named by its place.

Shapes and numbers only; what a loss computes is in ``losses``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tg_tinker.engine.training.batching import IGNORED
from tg_tinker.engine.training.losses import LOSSES, Loss, active_positions
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import checks
from tg_tinker.types.losses import settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from tg_tinker.engine.training.batching import Row

__all__ = ["inspect", "loss_settings"]

_SHOWN = 20


def loss_settings(loss_fn: str, config: Mapping[str, float | bool] | None) -> tuple[Loss, dict[str, float | bool]]:
    """Look a loss up and complete its config.

    Raises ``InvalidRequestError`` for an unknown loss, an unknown key (naming those that exist), a value out of range.
    """
    complete = settings(loss_fn, config)
    smoothing = complete.get("label_smoothing", 0.0)
    if not 0.0 <= smoothing < 0.5:
        raise checks.refuse("loss_fn_config.label_smoothing", "a number from 0 up to, not including, 0.5", smoothing)
    low, high = complete.get("clip_low_threshold", 0.0), complete.get("clip_high_threshold", 1.0)
    if not 0.0 <= low <= high:
        raise checks.refuse("loss_fn_config.clip_low_threshold", "from 0 up to clip_high_threshold", low)
    return LOSSES[loss_fn], complete


def inspect(rows: Sequence[Row], loss: Loss, *, vocab_size: int, max_length: int) -> None:
    """Check rows: tokens, lengths, targets, and the presence, shape and finiteness of every input of the loss.

    Raises ``InvalidRequestError`` with all problems, the first in the message.
    """
    if not rows:
        raise checks.refuse("data", "at least one row", 0)
    if len(rows) % loss.rows_per_unit:
        raise checks.refuse("data", "an even number of rows: chosen, rejected, chosen, ...", len(rows))
    ranks = {row.targets.shape[1:] for row in rows}
    if len(ranks) > 1 or (ranks != {()} and (loss.is_rl or loss.rows_per_unit > 1)):
        constraint = "one target per position, or for cross_entropy the same K for every row"
        raise checks.refuse("data[*].loss_fn_inputs.target_tokens", constraint, sorted(ranks))
    problems = [problem for row in rows for problem in _row_problems(row, loss, vocab_size, max_length)]
    if problems:
        told, _, place = problems[0].rpartition(" @ $.")
        constraint = told.partition("; expected ")[2]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InvalidRequestError(problems[0] + more, field=place, constraint=constraint, problems=problems[:_SHOWN])


def _row_problems(row: Row, loss: Loss, vocab_size: int, max_length: int) -> Iterator[str]:
    length = len(row.tokens)
    if not 1 <= length <= max_length:
        yield f"{length} tokens; expected 1 to {max_length} @ {row.where('tokens')}"
        return
    yield from _out_of_range(row.tokens, row.tokens >= 0, vocab_size, row.where("tokens"))
    if row.targets.shape[0] != length or row.targets.ndim > 2:
        yield f"shape {row.targets.shape}; expected one target per token ({length}) @ {row.where('target_tokens')}"
        return
    yield from _out_of_range(row.targets, row.targets != IGNORED, vocab_size, row.where("target_tokens"))
    yield from _input_problems(row, loss)


def _input_problems(row: Row, loss: Loss) -> Iterator[str]:
    missing = [name for name in loss.required_inputs if name not in row.inputs]
    needed = ", ".join(loss.required_inputs)
    yield from (f"missing; expected {needed} with this loss @ {row.where(name)}" for name in missing)
    shapes = {name: row.inputs[name].shape for name in loss.input_names if name in row.inputs}
    wrong = [name for name, shape in shapes.items() if shape != _expected_shape(row, name)]
    for name in wrong:
        yield f"shape {shapes[name]}; expected {_expected_shape(row, name)} @ {row.where(name)}"
    if missing or wrong:
        return
    active = active_positions(loss, row)
    for name in shapes:
        values = row.inputs[name]
        if name == "temperatures":
            wrong_there = row.labelled & ~(np.isfinite(values) & (values > 0))
            yield from _first(wrong_there, values, "a finite number above 0", row.where(name))
        else:
            yield from _first(active & ~np.isfinite(values), values, "a finite number", row.where(name))


def _expected_shape(row: Row, name: str) -> tuple[int, ...]:
    return row.tokens.shape if name == "temperatures" else row.targets.shape


def _out_of_range(ids: NDArray[np.int64], used: NDArray[Any], vocab_size: int, where: str) -> Iterator[str]:
    yield from _first(
        (used & ((ids < 0) | (ids >= vocab_size))) | (ids < IGNORED), ids, f"0 to {vocab_size - 1}", where
    )


def _first(bad: NDArray[Any], values: NDArray[Any], expected: str, where: str) -> Iterator[str]:
    """Name the first bad value of an array, by its index; an infinity of the client's comes out of JSON as a NaN."""
    if bad.any():
        index = np.unravel_index(int(bad.argmax()), bad.shape)
        told = values[index] if np.isfinite(values[index]) else "not finite"
        yield f"{told}; expected {expected} @ {where}{''.join(f'[{int(i)}]' for i in index)}"
