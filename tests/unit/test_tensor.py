"""TensorData: dtypes, shapes, and the ways in and out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.arrays import DTYPES
from tg_tinker.types.tensor import TensorData
from tg_tinker.wire import codec

NUMPY_DTYPES = [name for name in DTYPES if name != "bfloat16"]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy_arrays_keep_dtype_and_shape(dtype: str) -> None:
    """A numpy array of every dtype that crosses the wire comes back with the same dtype, shape and values."""
    array = np.arange(6).reshape(2, 3).astype(dtype)
    tensor = TensorData.from_numpy(array)
    assert (tensor.dtype, tensor.shape) == (dtype, [2, 3])
    assert np.array_equal(tensor.to_numpy(), array)
    assert tensor.tolist() == array.tolist()
    assert tensor.data == array.ravel().tolist()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_torch_tensors_keep_dtype_and_shape(dtype: str) -> None:
    """A torch tensor of every dtype, bfloat16 too, survives the way in and out."""
    torch = pytest.importorskip("torch", reason="torch tensors are taken where torch is installed")
    source = torch.arange(6).reshape(3, 2).to(getattr(torch, dtype))
    tensor = TensorData.from_torch(source)
    assert (tensor.dtype, tensor.shape) == (dtype, [3, 2])
    back = tensor.to_torch()
    assert back.dtype == source.dtype
    assert torch.equal(back, source)


def test_a_list_gives_its_own_shape() -> None:
    """``from_list`` takes nested lists as they are, float32 unless told otherwise."""
    assert TensorData.from_list([[1, 2], [3, 4]]).shape == [2, 2]
    assert TensorData.from_list([1, 2], "int64").data == [1, 2]
    assert TensorData.from_list([]).shape == [0]


def test_a_flat_list_takes_the_shape_it_is_given() -> None:
    """The flat data of the wire is folded to its shape, row by row."""
    assert TensorData(data=[1, 2, 3, 4], dtype="int64", shape=[2, 2]).tolist() == [[1, 2], [3, 4]]


def test_none_means_nan_in_a_float_tensor() -> None:
    """JSON's null stands for NaN among floats, as the published trainer sends it."""
    assert math.isnan(TensorData([1.0, None], "float32").data[1])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (([1, 2, 3], "int64", [2]), "shape"),
        (([1], "int64", [-1]), "shape"),
        (([1], "complex64"), "dtype"),
        (([1.5], "int64"), "data"),
        ((["a"], "float32"), "data"),
        (([[1, 2], [3]], "int64"), "data[1]"),
        (([None], "int64"), "data"),
        (([1, True], "int64"), "data[1]"),
        ((np.array([True]), "int8"), "data"),
        (([1], "int64", [[1]]), "shape"),
        (([1], "int64", [True]), "shape[0]"),
    ],
    ids=str,
)
def test_a_wrong_tensor_is_refused_by_field(arguments: Any, field: str) -> None:
    """A count that is not the shape's, an unknown dtype, fractions among ints and ragged lists are refused."""
    with pytest.raises(InvalidRequestError) as caught:
        TensorData(*arguments)
    assert caught.value.field == field


def test_equality_and_repr() -> None:
    """Tensors are equal in dtype, shape and values, NaN included; the repr shows small ones whole."""
    assert TensorData([1.0, math.nan]) == TensorData([1.0, math.nan])
    assert TensorData([1.0]) != TensorData([1.0], "float64")
    assert TensorData([1.0]) != [1.0]
    assert repr(TensorData([1, 2], "int64")) == "TensorData(int64, shape=[2], [1, 2])"
    assert repr(TensorData(range(9), "int64")) == "TensorData(int64, shape=[9])"


@given(
    hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64, np.int32]), hnp.array_shapes(max_dims=3, max_side=4))
)
def test_every_finite_array_survives_the_wire(array: Any) -> None:
    """What is encoded and decoded again is the same tensor, to the last bit of each number."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        array = np.nan_to_num(array)
    tensor = TensorData.from_numpy(array)
    assert codec.decode(TensorData, codec.loads(codec.dumps(tensor))) == tensor


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(300, "int8"), (2**40, "int32"), (2, "bool"), (1e39, "float32"), (1e5, "float16"), (10**18, "float16")],
)
def test_a_value_that_its_dtype_cannot_hold_is_refused(value: int, dtype: str) -> None:
    """Nothing wraps around silently."""
    with pytest.raises(InvalidRequestError, match=f"values that fit {dtype}"):
        TensorData([value], dtype)
