"""Rows of both surfaces, and the micro-batches that they are put into."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures.training import random_rows
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.engine.training.batching import plan, rows_from_batch, rows_from_data
from tg_tinker.types.batch import BatchData
from tg_tinker.types.loops import Datum, ModelInput
from tg_tinker.types.tensor import TensorData


def test_a_batch_row_predicts_its_own_next_tokens() -> None:
    """Without labels each token's target is the next one, and the last predicts nothing."""
    (row,) = rows_from_batch(BatchData([[5, 6, 7]]))
    assert row.tokens.tolist() == [5, 6, 7]
    assert row.targets.tolist() == [6, 7, -100]


def test_labels_are_shifted_by_exactly_one() -> None:
    """The label of a token is the target of the position before it, -100 stays ignored."""
    (row,) = rows_from_batch(BatchData([[5, 6, 7, 8]], labels=[[-100, -100, 70, 80]]))
    assert row.targets.tolist() == [-100, 70, 80, -100]


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
def test_padding_on_either_side_gives_the_same_row(mask: list[int]) -> None:
    """Left and right padding vanish."""
    ids = np.full(5, 9)
    ids[np.array(mask) == 1] = [5, 6, 7]
    (row,) = rows_from_batch(BatchData([ids.tolist()], [mask], [ids.tolist()]))
    assert row.tokens.tolist() == [5, 6, 7]
    assert row.targets.tolist() == [6, 7, -100]


def test_a_datum_is_taken_as_it_is() -> None:
    """Loops targets are not shifted, and the other tensors come along."""
    inputs = {"target_tokens": TensorData([7, -100], "int64"), "advantages": TensorData([0.5, 1.0])}
    (row,) = rows_from_data([Datum(ModelInput.from_ints([5, 6]), inputs)])
    assert row.targets.tolist() == [7, -100]
    assert row.inputs["advantages"].tolist() == [0.5, 1.0]
    assert set(row.inputs) == {"advantages"}


def test_a_datum_without_targets_predicts_its_own_next_tokens() -> None:
    """Absent targets are the next tokens, and the last position is ignored."""
    (row,) = rows_from_data([Datum(ModelInput.from_ints([5, 6, 7]))])
    assert row.targets.tolist() == [6, 7, -100]


def test_rows_know_their_place_in_the_request() -> None:
    """Errors can name where a value came from, in the words of its surface."""
    (datum,) = rows_from_data([Datum(ModelInput.from_ints([5]))])
    (row,) = rows_from_batch(BatchData([[5]]))
    assert datum.where("tokens") == "$.data[0].model_input"
    assert datum.where("advantages") == "$.data[0].loss_fn_inputs.advantages"
    assert row.where("tokens") == "$.batch.input_ids[0]"
    assert row.where("target_tokens") == "$.batch.labels[0]"


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 1000), st.sampled_from([1, 2]))
def test_every_row_is_in_exactly_one_micro_batch(lengths: list[int], max_tokens: int, group: int) -> None:
    """Nothing is lost or doubled, groups stay together and in order, and only a group alone may pass the bound."""
    rows = random_rows(*lengths[: len(lengths) // group * group])
    planned = plan(rows, max_tokens=max_tokens, group=group)
    assert sorted(index for indices in planned for index in indices) == list(range(len(rows)))
    for indices in planned:
        units = [indices[start : start + group] for start in range(0, len(indices), group)]
        assert all(unit == list(range(unit[0], unit[0] + group)) for unit in units)
        assert all(unit[0] % group == 0 for unit in units)
        padded = len(indices) * max(len(rows[index].tokens) for index in indices)
        assert padded <= max_tokens or len(units) == 1


def test_rows_of_similar_length_share_a_micro_batch() -> None:
    """Long and short rows are not padded to each other, equal ones go together."""
    rows = random_rows(500, 20, 490, 22, 500)
    assert plan(rows, max_tokens=4096) == [[0, 4, 2], [3, 1]]


def test_a_plan_depends_on_the_rows_alone() -> None:
    """The same rows are planned the same way every time."""
    rows = random_rows(*range(1, 60))
    assert plan(rows, max_tokens=512) == plan(rows, max_tokens=512)
