"""BatchData: the rows of one TG forward_backward, from whatever the data loader yields.

The Hugging Face convention: labels are aligned with ``input_ids`` (the shift happens inside), -100 is ignored, absent
labels are ``input_ids`` where ``attention_mask`` is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import arguments, arrays, checks
from tg_tinker.types.tokens import encode, end_of_text, padding
from tg_tinker.types.value import Input

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@attrs.frozen(eq=False, init=False)
class BatchData(Input):
    """A rectangular batch of token ids, ``(rows, positions)`` each, as int64.

    Takes nested lists, numpy arrays or torch tensors. ``attention_mask`` is 1 for real tokens and 0 for padding, on
    either side; without one every token is real. ``labels`` are aligned with the tokens, -100 is ignored; without them
    every real token is one. The server checks vocabulary and length, which are the model's.

    Raises ``InvalidRequestError`` naming the field, and the row where there is one.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    labels: NDArray[np.int64] | None

    def __init__(self, input_ids: object, attention_mask: object = None, labels: object = None) -> None:
        ids = _matrix(input_ids, "input_ids")
        if ids.size == 0:
            raise checks.refuse("input_ids", "at least one row of at least one token", input_ids)
        if (ids < 0).any():
            row, position = divmod(int((ids < 0).argmax()), ids.shape[1])
            raise checks.refuse(f"input_ids[{row}][{position}]", "a token id of at least 0", int(ids[row, position]))
        mask = _ones_like(ids) if attention_mask is None else _mask(attention_mask, ids.shape)
        if not ((mask == 0) | (mask == 1)).all():
            raise checks.refuse("attention_mask", "only 0 and 1", attention_mask)
        empty = (mask.sum(axis=1) == 0).nonzero()[0]
        if empty.size:
            raise checks.refuse(f"attention_mask[{int(empty[0])}]", "at least one real token in every row", 0)
        kept = None if labels is None else _shaped(labels, "labels", ids.shape)
        if kept is not None and ((kept < 0) & (kept != IGNORED)).any():
            raise checks.refuse("labels", f"token ids of at least 0, or {IGNORED} to ignore a position", labels)
        checks.assign(self, input_ids=ids, attention_mask=mask, labels=kept)

    @classmethod
    def of(cls, value: BatchData | Mapping[str, Any], at: str = "batch") -> BatchData:
        """The batch itself, or one made of a dict (or of a tokenizer's output) with the same fields.

        ``at`` is the name by which errors call it.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise checks.refuse(at, "a BatchData or a dict of input_ids, attention_mask and labels", value)
        try:
            checks.refuse_unknown(cls, value)
            if "input_ids" not in value:
                raise checks.refuse("input_ids", "rows of token ids", None)
            return cls(**value)
        except InvalidRequestError as error:
            raise checks.located(error, at) from error

    @classmethod
    def from_texts(
        cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int | None = None
    ) -> BatchData:
        """Encode texts, end each with the end-of-text token, pad on the right; every token is a label.

        ``max_length`` (tokens) cuts longer texts. Example: ``BatchData.from_texts(tc.get_tokenizer(), ["a", "b c"])``.
        """
        if isinstance(texts, str) or not texts:
            raise checks.refuse("texts", "a non-empty list of strings", texts)
        longest = None if max_length is None else arguments.whole("max_length", max_length, 1)
        end = end_of_text(tokenizer)
        rows = [[*encode(tokenizer, f"texts[{index}]", text), *end][:longest] for index, text in enumerate(texts)]
        width = max(map(len, rows))
        pad = padding(tokenizer)
        return cls(
            [row + [pad] * (width - len(row)) for row in rows],
            [[1] * len(row) + [0] * (width - len(row)) for row in rows],
            [row + [IGNORED] * (width - len(row)) for row in rows],
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested lists, as they cross the wire."""
        return {
            "input_ids": self.input_ids.tolist(),
            "attention_mask": self.attention_mask.tolist(),
            "labels": None if self.labels is None else self.labels.tolist(),
        }


def require_labels(batch: BatchData) -> None:
    """Refuse a batch in which there is nothing to predict: a mean over no tokens is no loss, and 0.0 looks like one."""
    real = batch.attention_mask == 1
    wanted = real if batch.labels is None else real & (batch.labels != IGNORED)
    if not (wanted & (real.cumsum(axis=1) > 1)).any():
        constraint = f"a token to predict in at least one row: not {IGNORED}, nor the first of its row"
        raise checks.refuse("batch.labels", constraint, None if batch.labels is None else batch.labels.tolist())


def _mask(value: object, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return _shaped(value, "attention_mask", shape, flags=True)  # tokenizers and libraries have masks of True and False


def _matrix(value: object, field: str, *, flags: bool = False) -> NDArray[np.int64]:
    matrix = arrays.whole_numbers(value, field, flags=flags)
    if matrix.ndim != 2:
        raise checks.refuse(field, f"rows of token ids, two dimensions, not {matrix.ndim}", value)
    return matrix


def _shaped(value: object, field: str, shape: tuple[int, ...], *, flags: bool = False) -> NDArray[np.int64]:
    matrix = _matrix(value, field, flags=flags)
    if matrix.shape != shape:
        raise checks.refuse(field, f"the shape of input_ids {shape}", matrix.shape)
    return matrix


def _ones_like(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    import numpy as np

    return np.ones_like(ids)
