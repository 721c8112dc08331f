"""Names that stand twice in one JSON object. Parsers keep the last value and drop the others without a word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import checks

__all__ = ["refuse_repeated"]


def refuse_repeated(body: bytes, parsed: object) -> None:
    """Raise ``InvalidRequestError`` with the first name that ``body``, which is ``parsed``, gives twice in one object.

    A colon follows every name: where there are no more colons than names were parsed, no name was dropped, and numbers
    by the million cost next to nothing. Only where there are more, and texts have some too, the body is read again.
    """
    if body.count(b":") > _count(parsed):
        try:
            json.loads(body, object_pairs_hook=_once, parse_int=str, parse_float=str)
        except RecursionError as error:
            raise InvalidRequestError("body: nested too deep", field="body", constraint="fewer levels") from error


def _count(parsed: object) -> int:
    """How many names there are, or fewer: a list whose first item is neither object nor list is taken for all such."""
    count, waiting = 0, [parsed]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            count += len(value)
            waiting.extend(value.values())
        elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            waiting.extend(value)
    return count


def _once(pairs: Sequence[tuple[str, Any]]) -> None:
    seen = set()
    for name, _ in pairs:
        if name in seen:
            wanted = "one value"
            raise InvalidRequestError(
                f"{checks.shown(name)}: expected {wanted}, got two", field=name, constraint=wanted
            )
        seen.add(name)
