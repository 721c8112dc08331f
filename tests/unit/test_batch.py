"""BatchData: what a data loader yields becomes rectangular int64 arrays, or an error that says where it is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.batch import BatchData

torch = pytest.importorskip("torch", reason="the batch takes torch tensors where torch is installed")


class Words:
    """A tokenizer of one id per character."""

    eos_token_id = 7
    pad_token_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


@pytest.mark.parametrize(
    "make", [lambda rows: rows, np.array, torch.tensor, lambda rows: [tuple(row) for row in rows]], ids=str
)
def test_lists_numpy_and_torch_are_taken(make: Any) -> None:
    """Nested lists, tuples, numpy arrays and torch tensors give the same batch."""
    batch = BatchData(make([[1, 2], [3, 4]]), make([[1, 1], [1, 0]]), make([[1, -100], [3, -100]]))
    assert batch.to_dict() == {
        "input_ids": [[1, 2], [3, 4]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[1, -100], [3, -100]],
    }
    assert batch.input_ids.dtype == np.int64


def test_an_absent_mask_means_that_every_token_is_real() -> None:
    """Without an attention mask there is no padding; absent labels stay absent for the engine to fill in."""
    batch = BatchData([[1, 2, 3]])
    assert batch.attention_mask.tolist() == [[1, 1, 1]]
    assert batch.labels is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input_ids": [[1, 2], [3]]}, "batch.input_ids[1]"),
        ({"input_ids": []}, "batch.input_ids"),
        ({"input_ids": [[]]}, "batch.input_ids"),
        ({"input_ids": [1, 2]}, "batch.input_ids"),
        ({"input_ids": [[[1]]]}, "batch.input_ids"),
        ({"input_ids": [["a", "b"]]}, "batch.input_ids"),
        ({"input_ids": None}, "batch.input_ids"),
        ({"input_ids": [[1, -2]]}, "batch.input_ids[0][1]"),
        ({"input_ids": [[1.5]]}, "batch.input_ids"),
        ({"input_ids": [[float("nan")]]}, "batch.input_ids"),
        ({"input_ids": [[1e30]]}, "batch.input_ids"),
        ({"input_ids": np.array([[2**64 - 100]], np.uint64)}, "batch.input_ids"),
        ({"input_ids": [[True, False]]}, "batch.input_ids[0][0]"),
        ({"input_ids": [[1, 2], (3, True)]}, "batch.input_ids[1][1]"),
        ({"input_ids": [[1, np.True_]]}, "batch.input_ids[0][1]"),
        ({"input_ids": np.array([[True, False]])}, "batch.input_ids"),
        ({"input_ids": torch.tensor([[True, False]])}, "batch.input_ids"),
        ({"input_ids": [[1, 2]], "labels": [[1, False]]}, "batch.labels[0][1]"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "batch.attention_mask"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "batch.attention_mask"),
        ({"input_ids": [[1], [2]], "attention_mask": [[1], [0]]}, "batch.attention_mask[1]"),
        ({"input_ids": [[1, 2]], "labels": [[1, -1]]}, "batch.labels"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2], [1, 2]]}, "batch.labels"),
        ({"input_ids": [[1]], "token_type_ids": [[0]]}, "batch.token_type_ids"),
        ({}, "batch.input_ids"),
    ],
    ids=str,
)
def test_a_wrong_batch_is_refused_by_place(fields: dict[str, Any], field: str) -> None:
    """Ragged, empty, negative, fractional, boolean, huge or misnamed input is refused with its place in the batch."""
    with pytest.raises(InvalidRequestError) as caught:
        BatchData.of(fields)
    assert caught.value.field == field
    assert caught.value.problems[0].endswith(f"@ $.{field}")


@pytest.mark.parametrize("value", [None, 3, "text", [[1, 2]]])
def test_something_else_than_a_batch_is_refused(value: Any) -> None:
    """Only a BatchData or a dict is a batch."""
    with pytest.raises(InvalidRequestError) as caught:
        BatchData.of(value)
    assert caught.value.field == "batch"


@pytest.mark.parametrize("mask", [[[True, False]], np.array([[True, False]]), torch.tensor([[True, False]])])
def test_a_mask_may_be_made_of_true_and_false(mask: Any) -> None:
    """An attention mask of booleans, as libraries make them, is one of 1 and 0."""
    assert BatchData([[1, 2]], mask).attention_mask.tolist() == [[1, 0]]


def test_floats_without_fractions_are_whole_numbers() -> None:
    """A float array that holds whole numbers, as some loaders give, is taken."""
    assert BatchData(np.array([[1.0, 2.0]])).input_ids.tolist() == [[1, 2]]


def test_texts_become_a_padded_batch() -> None:
    """Each text ends with the end-of-text token; padding is masked and ignored; long texts are cut."""
    batch = BatchData.from_texts(Words(), ["ab", "abcdef"], max_length=4)  # type: ignore[arg-type]
    assert batch.input_ids.tolist() == [[97, 98, 7, 0], [97, 98, 99, 100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[97, 98, 7, -100], [97, 98, 99, 100]]


@pytest.mark.parametrize("texts", ["one string", [], ()])
def test_texts_must_be_a_list(texts: Any) -> None:
    """A single string and an empty list are refused, for they are the two usual slips."""
    with pytest.raises(InvalidRequestError) as caught:
        BatchData.from_texts(Words(), texts)  # type: ignore[arg-type]
    assert caught.value.field == "texts"


@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 2**31)))
def test_every_matrix_of_ids_is_a_batch(ids: Any) -> None:
    """Any rectangular, non-empty matrix of ids is taken unchanged, and its dict makes it again."""
    batch = BatchData(ids)
    assert np.array_equal(batch.input_ids, ids)
    again = BatchData.of(batch.to_dict())
    assert np.array_equal(again.attention_mask, np.ones_like(ids))
