"""Field checks shared by every value type: attrs validators and converters that raise ``InvalidRequestError``.

Not for batches and tensors, which check themselves with numpy (``batch``, ``tensor``).
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard, TypeVar

import attrs

from tg_tinker.errors import InvalidRequestError

T = TypeVar("T")
Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]

MOST_LEVELS = 64  # of JSON values that mean nothing to us
_LONGEST_NAME = 100  # characters of a name that nobody knows, in messages

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 4, 80, 80
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxset = _BRIEF.maxfrozenset = _BRIEF.maxdict = 20


def refuse(field: str, constraint: str, value: object) -> InvalidRequestError:
    """Make the error for one wrong field, such as "rank": what was expected, and what came."""
    problem = f"expected {constraint}, got {shown(value)} @ $.{field}"
    return InvalidRequestError(
        f"{field}: expected {constraint}, got {shown(value)}", field=field, constraint=constraint, problems=[problem]
    )


def shown(value: object, limit: int = 60) -> str:
    """A short repr, for messages; of what is long or deep it reads no more than the beginning."""
    try:
        text = _BRIEF.repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        return f"one {type(value).__name__} too long to show"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def finite(value: object) -> TypeGuard[float]:
    """Whether it is a number (not a bool) within the range of floats."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond that range
        return False


def integer(low: int, high: int | None = None) -> Validator:
    """An int (not a bool) of at least ``low`` and at most ``high``."""
    wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        good = isinstance(value, int) and not isinstance(value, bool)
        if not good or value < low or (high is not None and value > high):  # type: ignore[operator]
            raise refuse(attribute.name, wanted, value)

    return check


def number(
    low: float = -math.inf, high: float = math.inf, *, above: float | None = None, below: float | None = None
) -> Validator:
    """A finite number from ``low`` to ``high``; strictly greater than ``above``, strictly less than ``below``."""
    floor = f"greater than {above}" if above is not None else f"of at least {low}" if low > -math.inf else ""
    ceiling = f"and less than {below}" if below is not None else f"and at most {high}" if high < math.inf else ""
    wanted = " ".join(part for part in ("a finite number", floor, ceiling) if part)

    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        within = finite(value) and low <= value <= high
        if not within or (above is not None and value <= above) or (below is not None and value >= below):
            raise refuse(attribute.name, wanted, value)

    return check


def choice(*allowed: str) -> Validator:
    """One of the given strings."""
    wanted = "one of " + ", ".join(repr(name) for name in allowed)

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or value not in allowed:
            raise refuse(attribute.name, wanted, value)

    return check


def instance(kind: type | tuple[type, ...], wanted: str) -> Validator:
    """A value of the given type; ``wanted`` names it for the reader."""

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in _as_tuple(kind)):
            raise refuse(attribute.name, wanted, value)

    return check


def json_object() -> Validator:
    """A dict that JSON can hold, of at most ``MOST_LEVELS`` levels: every walk through it is a recursion."""
    wanted = f"a dict of JSON values, at most {MOST_LEVELS} levels deep"

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, dict) or not _shallow(value, MOST_LEVELS):
            raise refuse(attribute.name, wanted, value)

    return check


def _shallow(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_shallow(item, levels - 1) for item in items if isinstance(item, dict | list | tuple))


def flag() -> Validator:
    """True or False, nothing that merely looks like it."""
    return instance(bool, "True or False")


def text(*, empty: bool = False) -> Validator:
    """A string, by default with something in it."""

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or not (value or empty):
            raise refuse(attribute.name, "a string" if empty else "a non-empty string", value)

    return check


def texts(*, empty: bool = False, most: int | None = None) -> Validator:
    """A tuple of non-empty strings, at most ``most``."""
    wanted = "a list of non-empty strings" if most is None else f"a list of at most {most} non-empty strings"

    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        good = isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
        if not good or not (value or empty) or (most is not None and len(value) > most):
            raise refuse(attribute.name, wanted, value)

    return check


def optional(check: Validator) -> Validator:
    """None, or what ``check`` accepts."""
    return attrs.validators.optional(check)


def tupled(value: Any) -> Any:
    """Turn a list into a tuple, so that frozen values stay frozen; leave the rest for the validator."""
    return tuple(value) if isinstance(value, list) else value


def assign(value: object, **fields: object) -> None:
    """Set the fields of a frozen value from its own ``__init__``."""
    for name, field in fields.items():
        object.__setattr__(value, name, field)


def nested(cls: type[T], value: object, field: str) -> T:
    """Another config inside a config: an instance as it is, a dict of its fields built and checked."""
    if isinstance(value, cls):
        return value
    if isinstance(value, Mapping):
        return build(cls, value, at=field)
    raise refuse(field, f"{cls.__name__}(...) or a dict of its fields", value)


def build(cls: type[T], fields: Mapping[str, Any], at: str = "") -> T:
    """Construct ``cls`` from a mapping; an unknown field is refused with the nearest name that exists.

    ``at`` is where the mapping sits in a larger one (``"lora_config"``): error fields carry it as a prefix.
    """
    try:
        refuse_unknown(cls, fields)
    except InvalidRequestError as error:
        raise located(error, at) from error
    missing = [f.name for f in attrs.fields(cls) if f.init and f.default is attrs.NOTHING and f.name not in fields]  # type: ignore[arg-type]
    if missing:
        raise located(refuse(missing[0], "a value (it has no default)", None), at)
    try:
        return cls(**fields)
    except InvalidRequestError as error:
        if not at:
            raise
        raise located(error, at) from error


def located(error: InvalidRequestError, at: str) -> InvalidRequestError:
    """The same error, its field and problems moved below ``at``."""
    if not at:
        return error
    field = f"{at}.{error.field}" if error.field else at
    problems = [problem.replace("@ $", f"@ $.{at}", 1) for problem in error.problems]
    problems = problems or [f"{error.message} @ $.{field}"]
    named = error.field is not None and error.message.startswith(error.field)  # "rank: expected ..."
    message = f"{at}{'.' if named else ': '}{error.message}"
    return InvalidRequestError(message, field=field, constraint=error.constraint, problems=problems)


def refuse_unknown(cls: type, fields: Mapping[str, Any], *also: str) -> None:
    """Raise ``InvalidRequestError`` for the first name that is neither a field of ``cls`` nor in ``also``."""
    known = [field.alias or field.name for field in attrs.fields(cls) if field.init]
    refuse_others(fields, [*known, *also], f"no field of {cls.__name__}")


def refuse_others(names: Collection[str], known: Collection[str], problem: str) -> None:
    """Raise ``InvalidRequestError`` for the first name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            field = str(name)[:_LONGEST_NAME]
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(known)}"
            told = f"{problem}; {hint}"
            one = f"one of {', '.join(known)}"
            message, problems = f"{field}: {told}", [f"{told} @ $.{field}"]
            raise InvalidRequestError(message, field=field, constraint=one, problems=problems)


def _as_tuple(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)
