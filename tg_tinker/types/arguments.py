"""Checks of single arguments, for methods; fields of values are checked by ``checks``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tg_tinker.types import checks

__all__ = ["MOST_SECONDS", "flag", "optional_text", "patience", "seconds", "text", "texts", "whole"]

MOST_SECONDS = 3_155_760_000  # a hundred years: what lives longer needs no time to live


def text(field: str, value: object) -> str:
    """A non-empty string that UTF-8 can write: one without halves of surrogate pairs."""
    if not isinstance(value, str) or not value:
        raise checks.refuse(field, "a non-empty string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise checks.refuse(field, "text that UTF-8 can write", value) from error
    return value


def texts(field: str, value: object) -> tuple[str, ...]:
    """One such string or several; the error names the one that is none."""
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not given:
        raise checks.refuse(field, "a string or a non-empty list of strings", value)
    return tuple(text(f"{field}[{index}]", one) for index, one in enumerate(given))


def optional_text(field: str, value: object) -> str | None:
    """A non-empty string, or None."""
    return None if value is None else text(field, value)


def whole(field: str, value: object, low: int, high: int | None = None) -> int:
    """An int (not a bool) of at least ``low`` and at most ``high``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise checks.refuse(field, wanted, value)
    return value


def seconds(field: str, value: object) -> float:
    """A finite length of time greater than 0."""
    if not checks.finite(value) or value <= 0:
        raise checks.refuse(field, "a number of seconds greater than 0", value)
    return float(value)


def patience(field: str, value: object) -> float | None:
    """How long to wait, never less than 0 seconds; None, and infinity, are as long as it takes."""
    if value is None:
        return None
    if isinstance(value, float) and math.isinf(value):
        return None if value > 0 else 0.0
    if not checks.finite(value):
        raise checks.refuse(field, "seconds or None", value)
    return max(0.0, float(value))


def flag(field: str, value: object) -> bool:
    """True or False, nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise checks.refuse(field, "True or False", value)
    return value
