"""TensorData: a named-dtype tensor as it crosses the Loops wire, backed by numpy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.types import arrays, checks
from tg_tinker.types.value import Input

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray


@attrs.frozen(eq=False, init=False, repr=False)
class TensorData(Input):
    """A tensor of ``shape``, its values in row-major order.

    ``data`` is a flat (or nested) list, a numpy array or a torch tensor; ``dtype`` one of float64, float32, float16,
    bfloat16, int64, int32, int8, bool. ``shape`` defaults to that of ``data``. None in a float tensor means NaN.

    Raises ``InvalidRequestError`` when the count of values is not the product of the shape, or the dtype is unknown.
    """

    array: NDArray[Any]
    dtype: str

    def __init__(self, data: object, dtype: str = "float32", shape: Sequence[int] | None = None) -> None:
        if not isinstance(dtype, str) or dtype not in arrays.DTYPES:
            raise checks.refuse("dtype", f"one of {', '.join(arrays.DTYPES)}", dtype)
        array = _values(data, dtype)
        if shape is not None:
            sizes = arrays.whole_numbers(shape, "shape")
            if sizes.ndim != 1 or (sizes < 0).any() or math.prod(sizes.tolist()) != array.size:
                raise checks.refuse("shape", f"sizes whose product is the number of values, {array.size}", shape)
            array = array.reshape(sizes.tolist())
        checks.assign(self, array=array, dtype=dtype)

    @property
    def shape(self) -> list[int]:
        """The size of each dimension."""
        return list(self.array.shape)

    @property
    def data(self) -> list[Any]:
        """The values as one flat list, row-major."""
        return self.array.ravel().tolist()

    def tolist(self) -> list[Any]:
        """The values as nested lists of the tensor's shape."""
        return self.array.tolist()  # type: ignore[no-any-return]

    def to_numpy(self) -> NDArray[Any]:
        """The numpy array itself (bfloat16 is held as float32)."""
        return self.array

    def to_torch(self) -> torch.Tensor:
        """A torch tensor of the named dtype, on the CPU. Needs torch."""
        import torch

        return torch.from_numpy(self.array.copy()).to(getattr(torch, self.dtype))

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Copy a torch tensor, keeping shape and dtype."""
        return cls(tensor, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> TensorData:
        """Take a numpy array, keeping shape and dtype."""
        return cls(array, str(array.dtype), list(array.shape))

    @classmethod
    def from_list(cls, data: Sequence[Any], dtype: str = "float32") -> TensorData:
        """Take a (nested) list; the shape is the list's own."""
        return cls(data, dtype)

    def to_dict(self) -> dict[str, Any]:
        """``{"data": flat list, "dtype": name, "shape": sizes}``."""
        return {"data": self.data, "dtype": self.dtype, "shape": self.shape}

    def __eq__(self, other: object) -> bool:
        """Equal in dtype, shape and every value (NaN equals NaN)."""
        if not isinstance(other, TensorData):
            return NotImplemented
        import numpy as np

        same = self.dtype == other.dtype and self.array.shape == other.array.shape
        return same and bool(np.array_equal(self.array, other.array, equal_nan=self.array.dtype.kind == "f"))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Dtype and shape, and the values where they are few."""
        values = f", {self.data}" if self.array.size <= 8 else ""
        return f"TensorData({self.dtype}, shape={self.shape}{values})"


def _values(data: object, dtype: str) -> NDArray[Any]:
    """The values in their dtype; what does not fit into it is refused, and True and False where it has integers."""
    import numpy as np

    if dtype == "bool" or dtype.startswith("int"):
        given = arrays.whole_numbers(data, "data", flags=dtype == "bool")
    else:
        given = arrays.as_array(_nan_for_none(data), "data")
    with np.errstate(over="ignore"):
        array = given.astype(arrays.DTYPES[dtype], copy=False)
    lost = np.isinf(array) & np.isfinite(given) if array.dtype.kind == "f" else array != given
    if lost.any():
        raise checks.refuse("data", f"values that fit {dtype}", data)
    return array


def _nan_for_none(data: object) -> object:
    if isinstance(data, list) and any(item is None for item in data):
        return [math.nan if item is None else item for item in data]
    return data
