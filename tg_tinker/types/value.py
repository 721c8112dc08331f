"""The common bases of values: ``Value`` gives plain JSON-ready data, ``Input`` knows what its caller may give it."""

from __future__ import annotations

import inspect
from datetime import datetime
from functools import cache
from typing import Any, Self

import attrs

from tg_tinker.types import checks


class Input:
    """A value that callers make: a keyword that it does not know is refused as in a dict, with the nearest known name.

    Python's own ``TypeError`` would name no field. Here, because it would come before anything of ``__init__`` runs. A
    subclass whose ``__init__`` takes any keyword sees to its names itself.
    """

    __slots__ = ()

    def __new__(cls, /, *_: Any, **fields: Any) -> Self:
        """Look at the names; ``__init__`` looks at the values."""
        kind: Any = cls
        known = _arguments(kind)
        if known is not None:
            checks.refuse_others(fields, known, f"no field of {cls.__name__}")
        return super().__new__(cls)


@cache
def _arguments(kind: Any) -> tuple[str, ...] | None:
    """What ``__init__`` takes, None if anything; of the class itself some Pythons tell what ``__new__`` does."""
    _, *taken = inspect.signature(kind.__init__).parameters.values()
    anything = any(one.kind is one.VAR_KEYWORD for one in taken)
    return None if anything else tuple(one.name for one in taken if one.kind is not one.VAR_POSITIONAL)


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
