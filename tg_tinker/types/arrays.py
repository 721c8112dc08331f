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
_BEYOND = 2.0**63  # the first number that int64 does not reach


def as_array(value: Any, field: str) -> NDArray[Any]:
    """A numpy array of whatever is array-like; ragged or non-numeric input is refused by ``field``."""
    import numpy as np

    try:
        array = np.asarray(_on_host(value))
    except (ValueError, TypeError, RuntimeError) as error:  # torch's are of the last kind
        raise _not_an_array(value, field) from error
    if array.dtype.kind not in "iufb":
        if array.size == 0:
            return array.astype(np.float64)
        raise _not_an_array(value, field)
    return array


def _on_host(value: Any) -> Any:
    """What numpy can read of a torch tensor, wherever it lives; anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    return value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.numpy()


def whole_numbers(value: object, field: str, *, flags: bool = False) -> NDArray[np.int64]:
    """A contiguous int64 array. Floats are taken where they are whole; True and False only where ``flags`` says so.

    Raises ``InvalidRequestError`` naming the place of what is no whole number of 64 bits.
    """
    import numpy as np

    array = as_array(value, field)
    if not flags:
        _refuse_flags(value, field)
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise _wrong(field, "whole numbers", value)
    if array.dtype.kind in "uf" and array.size and not (array.min() >= -_BEYOND and array.max() < _BEYOND):
        raise _wrong(field, "whole numbers of at most 64 bits", value)
    return array.astype(np.int64, order="C", copy=False)


def first_ragged_row(rows: object) -> int | None:
    """The index of the first row whose length differs from the first row's, where that can be told."""
    try:
        lengths = [len(row) for row in rows]  # type: ignore[attr-defined]
    except TypeError:
        return None
    return next((index for index, length in enumerate(lengths) if length != lengths[0]), None)


def _refuse_flags(value: object, field: str) -> None:
    """True and False are no numbers here, although numpy would count them as 1 and 0."""
    import numpy as np

    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in {"bool", "torch.bool"}:
        raise _wrong(field, "whole numbers, not True or False", value)
    if isinstance(value, list | tuple) and set(map(type, value)) - {int, float, np.int64}:
        for index, item in enumerate(value):
            _refuse_flags(item, f"{field}[{index}]")


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
