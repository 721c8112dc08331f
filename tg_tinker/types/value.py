"""The common base of result values: ``to_dict()`` gives plain JSON-ready data."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import attrs


class Value:
    """A frozen value that can be logged, stored or sent: ``to_dict`` uses nothing but JSON types."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of JSON types; datetimes as ISO 8601, tensors as data, dtype and shape."""
        fields = attrs.fields(type(self))  # type: ignore[arg-type]
        return {field.name: plain(getattr(self, field.name)) for field in fields}


def plain(value: Any) -> Any:
    """One value of ``to_dict``."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
