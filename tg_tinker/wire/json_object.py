"""What a caller gives to be kept as JSON: checked before it is sent, and brought into the form that comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tg_tinker.types import checks
from tg_tinker.wire import codec

__all__ = ["json_object"]


def json_object(field: str, value: object) -> dict[str, Any]:
    """A dict that JSON can hold, {} for None. Raises ``InvalidRequestError`` saying which value it cannot."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise checks.refuse(field, "a dict of JSON values", value)
    try:
        json.dumps(dict(value), allow_nan=False, default=_as_numbers)  # orjson would write a NaN as null
        plain: dict[str, Any] = codec.loads(codec.dumps(dict(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise checks.refuse(field, f"nothing but JSON values ({error})", value) from error
    return plain


def _as_numbers(value: Any) -> object:
    """The numbers of an array; what else there may be has none."""
    return value.tolist() if hasattr(value, "tolist") else None
