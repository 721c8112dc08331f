"""Rows: training examples of either surface in one form, and the micro-batches that they are computed in.

Which rows share a micro-batch depends on the request alone, never on load, so results repeat bit for bit. Values are
judged in ``inspection``; tensors are made in ``collation``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from tg_tinker.types import arrays
from tg_tinker.types.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from tg_tinker.types.batch import BatchData
    from tg_tinker.types.loops import Datum

__all__ = ["IGNORED", "Row", "plan", "rows_from_batch", "rows_from_data"]

_WASTE = 8  # at most one in so many positions of a micro-batch is padding ...
_SPARE = 64  # ... unless the padding is fewer positions than a micro-batch of its own would cost


@attrs.frozen(eq=False)
class Row:
    """One training example, not shifted: position i of ``tokens`` predicts ``targets[i]``; -100 ignores a position.

    ``inputs`` holds the loss's other tensors, each shaped like ``targets``, but ``temperatures`` always (T,). ``where``
    turns a field's name, and an index into that field, into the place in the request, for error messages.
    """

    tokens: NDArray[np.int64]  # (T,)
    targets: NDArray[np.int64]  # (T,) or (T, K)
    inputs: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)
    where: Callable[..., str] = attrs.field(default=lambda field, *index: f"$.{field}{_brackets(index)}")

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Where there is a target to predict, (T,)."""
        wanted: NDArray[np.bool_] = self.targets != IGNORED
        return wanted if wanted.ndim == 1 else np.any(wanted, axis=1)


def rows_from_batch(batch: BatchData) -> list[Row]:
    """Take the rows of a TG batch: padding dropped on either side, labels shifted so that each predicts the next."""
    return [_batch_row(batch, index) for index in range(len(batch.input_ids))]


def _batch_row(batch: BatchData, index: int) -> Row:
    real = batch.attention_mask[index] == 1
    tokens = batch.input_ids[index][real]
    labels = tokens if batch.labels is None else batch.labels[index][real]
    return Row(tokens, _shifted(labels), where=partial(_batch_place, index, real.nonzero()[0]))


def rows_from_data(data: Sequence[Datum]) -> list[Row]:
    """Take Loops datums as they are; without targets a datum's own next tokens are the targets."""
    return [_datum_row(datum, index) for index, datum in enumerate(data)]


def _datum_row(datum: Datum, index: int) -> Row:
    where = partial(_datum_place, index)
    inputs = {name: tensor.array for name, tensor in datum.loss_fn_inputs.items()}
    tokens = datum.model_input.to_numpy()
    given = inputs.pop("target_tokens", None)
    targets = _shifted(tokens) if given is None else arrays.whole_numbers(given, where("target_tokens")[2:])
    return Row(tokens, targets, inputs, where)


def plan(rows: Sequence[Row], *, max_tokens: int, group: int = 1) -> list[list[int]]:
    """Sort rows into micro-batches of similar length: indices, at most ``max_tokens`` padded positions in each.

    ``group`` consecutive rows stay together and in order (pairs of dpo). A group that is too long on its own gets a
    micro-batch of its own.
    """
    units = [range(first, first + group) for first in range(0, len(rows), group)]
    width = [max(len(rows[index].tokens) for index in unit) for unit in units]
    planned: list[list[int]] = []
    longest = used = 0  # tokens: the padded width of the last micro-batch, and the real ones in it
    for unit in sorted(range(len(units)), key=lambda unit: (-width[unit], unit)):
        real = sum(len(rows[index].tokens) for index in units[unit])
        padded = longest * (len(planned[-1]) + group) if planned else max_tokens + 1
        if padded > max_tokens or padded - used - real > max(_SPARE, padded // _WASTE):
            planned.append([])
            longest, used = width[unit], 0
        planned[-1].extend(units[unit])
        used += real
    return planned


def _shifted(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Move each label to the position that predicts it; the last position predicts nothing."""
    return np.append(labels[1:], np.int64(IGNORED))


def _batch_place(row: int, columns: NDArray[np.int64], field: str, position: int | None = None) -> str:
    """A place of the batch as it was sent, padding included; a label stands one behind where it is predicted."""
    name, shift = {"tokens": ("input_ids", 0), "target_tokens": ("labels", 1)}[field]
    return f"$.batch.{name}{_brackets((row,) if position is None else (row, int(columns[position + shift])))}"


def _datum_place(row: int, field: str, *index: int) -> str:
    name = "model_input" if field == "tokens" else f"loss_fn_inputs.{field}"
    return f"$.data[{row}].{name}{_brackets(index)}"


def _brackets(index: Sequence[int]) -> str:
    return "".join(f"[{position}]" for position in index)
