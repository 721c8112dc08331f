"""Checks of single arguments, for methods; fields of values are checked by ``checks``."""

from __future__ import annotations

from tg_tinker.types import checks

__all__ = ["optional_text", "text", "whole"]


def text(field: str, value: object) -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value:
        raise checks.refuse(field, "a non-empty string", value)
    return value


def optional_text(field: str, value: object) -> str | None:
    """A non-empty string, or None."""
    return None if value is None else text(field, value)


def whole(field: str, value: object, low: int, high: int | None = None) -> int:
    """An int (not a bool) of at least ``low`` and at most ``high``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise checks.refuse(field, wanted, value)
    return value
