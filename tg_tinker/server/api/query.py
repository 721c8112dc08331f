"""What a query string asks for: numbers, words, times, lengths of lists, checked by name. Bodies: see ``common``."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime

from aiohttp import web

from tg_tinker.types import checks

PAGE = 1000  # items of a list in one answer, at most
MOST = 10**15  # of whatever is counted: more than there will ever be, and exact in every kind of number


def only(request: web.Request, *known: str) -> None:
    """Refuse what a list cannot be asked for: it would look as if it did something."""
    checks.refuse_others(request.query, known, "no parameter of this list")


def number(request: web.Request, name: str, default: float) -> float:
    """A number of at least 0."""
    text = request.query.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e9:
        raise checks.refuse(name, "a number of at least 0", text)
    return value


def whole(request: web.Request, name: str, default: int, low: int = 0, high: int = MOST) -> int:
    """A whole number from ``low`` to ``high``."""
    text = request.query.get(name)
    return default if text is None else digits(name, text, low, high)


def limit(request: web.Request) -> int:
    """How many items of a list are wanted."""
    return whole(request, "limit", 100, 1, PAGE)


def choice(request: web.Request, name: str, allowed: Collection[str]) -> str | None:
    """One of some words, or None where none is given."""
    word = request.query.get(name)
    if word is not None and word not in allowed:
        raise checks.refuse(name, f"one of {', '.join(allowed)}", word)
    return word


def time(request: web.Request, name: str) -> datetime | None:
    """A moment, or None where none is given; a time without a zone is one of the server's own."""
    text = request.query.get(name)
    try:
        return None if text is None else datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):  # no time at all, or one that its zone puts outside the calendar
        raise checks.refuse(name, "a time in ISO 8601", text) from None


def digits(field: str, text: str, low: int = 0, high: int = MOST) -> int:
    """The whole number that a text writes out; raises ``InvalidRequestError`` naming ``field``."""
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(MOST)) else -1
    if not low <= value <= high:
        raise checks.refuse(field, f"a whole number from {low} to {high}", text)
    return value
