"""Whatever a user holds (lists, numpy, torch) as checked numpy arrays. numpy itself is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.checks import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: dtype names that cross the wire, and the numpy dtype each is kept in (bfloat16 has none: it is widened).
DTYPES = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "float32",
    "int64": "int64",
    "int32": "int32",
    "int8": "int8",
    "bool": "bool",
}


def as_array(value: Any, field: str) -> NDArray[Any]:
    """A numpy array of whatever is array-like; ragged or non-numeric input is refused by ``field``."""
    import numpy as np

    if hasattr(value, "detach"):  # a torch tensor, wherever it lives
        value = value.detach().cpu()
        value = value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise _not_an_array(value, field) from error
    if array.dtype.kind not in "iufb":
        if array.size == 0:
            return array.astype(np.float64)
        raise _not_an_array(value, field)
    return array


def whole_numbers(value: object, field: str) -> NDArray[np.int64]:
    """A contiguous int64 array; fractions are refused, floats without fractions are taken."""
    import numpy as np

    array = as_array(value, field)
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise _wrong(field, "whole numbers", value)
    return np.ascontiguousarray(array, dtype=np.int64)


def first_ragged_row(rows: object) -> int | None:
    """The index of the first row whose length differs from the first row's, where that can be told."""
    try:
        lengths = [len(row) for row in rows]  # type: ignore[attr-defined]
    except TypeError:
        return None
    return next((index for index, length in enumerate(lengths) if length != lengths[0]), None)


def _not_an_array(value: object, field: str) -> InvalidRequestError:
    ragged = first_ragged_row(value)
    if ragged is None:
        return _wrong(field, "numbers in a list, a numpy array or a torch tensor", value)
    at = f"{field}[{ragged}]"
    return _wrong(at, "a row as long as the first one (pad the batch)", value[ragged])  # type: ignore[index]


def _wrong(field: str, constraint: str, value: object) -> InvalidRequestError:
    message = f"{field}: expected {constraint}, got {shown(value)}"
    return InvalidRequestError(
        message, field=field, constraint=constraint, problems=[f"expected {constraint}, got {shown(value)} @ $.{field}"]
    )
