"""Judge a request against model and loss before any device work: every fault found is named by its place.

Shapes and numbers only; what a loss computes is in ``losses``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

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

Fault: TypeAlias = tuple[str, str, object]  # its place, what was expected there, what is there


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
    faults = [fault for row in rows for fault in _row_faults(row, loss, vocab_size, max_length)]
    if faults:
        raise _error(faults)


def _error(faults: Sequence[Fault]) -> InvalidRequestError:
    place, constraint, told = faults[0]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    field = place.removeprefix("$.")
    return InvalidRequestError(
        f"{field}: expected {constraint}, got {told}{more}",
        field=field,
        constraint=constraint,
        problems=[f"expected {constraint}, got {told} @ {place}" for place, constraint, told in faults[:_SHOWN]],
    )


def _row_faults(row: Row, loss: Loss, vocab_size: int, max_length: int) -> Iterator[Fault]:
    length = len(row.tokens)
    if not 1 <= length <= max_length:
        yield row.where("tokens"), f"1 to {max_length} tokens", length
        return
    ids = f"a token id from 0 to {vocab_size - 1}"
    yield from _first(_out_of_range(row.tokens, vocab_size), row, "tokens", row.tokens, ids)
    if row.targets.shape[0] != length or row.targets.ndim > 2:
        yield row.where("target_tokens"), f"one target per token, {length}", f"shape {row.targets.shape}"
        return
    wrong = _out_of_range(row.targets, vocab_size) & (row.targets != IGNORED)
    yield from _first(wrong, row, "target_tokens", row.targets, f"{ids}, or {IGNORED}")
    yield from _input_faults(row, loss)


def _input_faults(row: Row, loss: Loss) -> Iterator[Fault]:
    missing = [name for name in loss.required_inputs if name not in row.inputs]
    needed = f"a tensor: this loss needs {', '.join(loss.required_inputs)}"
    yield from ((row.where(name), needed, "none") for name in missing)
    shapes = {name: row.inputs[name].shape for name in loss.input_names if name in row.inputs}
    wrong = [name for name, shape in shapes.items() if shape != _expected_shape(row, name)]
    yield from ((row.where(name), f"shape {_expected_shape(row, name)}", str(shapes[name])) for name in wrong)
    if missing or wrong:
        return
    active = active_positions(loss, row)
    for name in shapes:
        values = row.inputs[name]
        if name == "temperatures":
            wrong_there = row.labelled & ~(np.isfinite(values) & (values > 0))
            yield from _first(wrong_there, row, name, values, "a finite number above 0")
        else:
            yield from _first(active & ~np.isfinite(values), row, name, values, "a finite number")


def _expected_shape(row: Row, name: str) -> tuple[int, ...]:
    return row.tokens.shape if name == "temperatures" else row.targets.shape


def _out_of_range(ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.bool_]:
    return (ids < 0) | (ids >= vocab_size)


def _first(bad: NDArray[Any], row: Row, name: str, values: NDArray[Any], expected: str) -> Iterator[Fault]:
    """Name the first bad value of an array, by its index; an infinity of the client's comes out of JSON as a NaN."""
    if bad.any():
        index = np.unravel_index(int(bad.argmax()), bad.shape)
        told = values[index] if np.isfinite(values[index]) else "one that is not"
        yield row.where(name, *(int(position) for position in index)), expected, told
