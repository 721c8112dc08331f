"""Field checks shared by every value type: attrs validators and converters that raise ``InvalidRequestError``.

Not for batches and tensors, which check themselves with numpy (``batch``, ``tensor``).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

from tg_tinker.errors import InvalidRequestError

T = TypeVar("T")
Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def refuse(field: str, constraint: str, value: object) -> InvalidRequestError:
    """Make the error for one wrong field, such as "rank": what was expected, and what came."""
    problem = f"expected {constraint}, got {shown(value)} @ $.{field}"
    return InvalidRequestError(
        f"{field}: expected {constraint}, got {shown(value)}", field=field, constraint=constraint, problems=[problem]
    )


def shown(value: object, limit: int = 60) -> str:
    """A short repr, for messages."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def integer(low: int, high: int | None = None) -> Validator:
    """An int (not a bool) of at least ``low`` and at most ``high``."""
    wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        good = isinstance(value, int) and not isinstance(value, bool)
        if not good or value < low or (high is not None and value > high):  # type: ignore[operator]
            raise refuse(attribute.name, wanted, value)

    return check


def number(low: float = -math.inf, high: float = math.inf, *, above: float | None = None) -> Validator:
    """A finite number from ``low`` to ``high``, or strictly greater than ``above``."""
    floor = f"greater than {above}" if above is not None else f"of at least {low}" if low > -math.inf else ""
    ceiling = f"and at most {high}" if high < math.inf else ""
    wanted = " ".join(part for part in ("a finite number", floor, ceiling) if part)

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high or (above is not None and value <= above):  # type: ignore[operator]
            raise refuse(attribute.name, wanted, value)

    return check


def choice(*allowed: str) -> Validator:
    """One of the given strings."""
    wanted = "one of " + ", ".join(repr(name) for name in allowed)

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value not in allowed:
            raise refuse(attribute.name, wanted, value)

    return check


def instance(kind: type | tuple[type, ...], wanted: str) -> Validator:
    """A value of the given type; ``wanted`` names it for the reader."""

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in _as_tuple(kind)):
            raise refuse(attribute.name, wanted, value)

    return check


def flag() -> Validator:
    """True or False, nothing that merely looks like it."""
    return instance(bool, "True or False")


def text(*, empty: bool = False) -> Validator:
    """A string, by default with something in it."""

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or not (value or empty):
            raise refuse(attribute.name, "a string" if empty else "a non-empty string", value)

    return check


def texts(*, empty: bool = False) -> Validator:
    """A tuple of non-empty strings."""

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        good = isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
        if not good or not (value or empty):
            raise refuse(attribute.name, "a list of non-empty strings", value)

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
    raise refuse(field, f"a {cls.__name__} or a dict of its fields", value)


def build(cls: type[T], fields: Mapping[str, Any], at: str = "") -> T:
    """Construct ``cls`` from a mapping; an unknown field is refused with the nearest name that exists.

    ``at`` is where the mapping sits in a larger one (``"lora_config"``): error fields carry it as a prefix.
    """
    known = [field.alias or field.name for field in attrs.fields(cls) if field.init]  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            raise located(_unknown(cls, str(name), known), at)
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


def _unknown(cls: type, name: str, known: list[str]) -> InvalidRequestError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
    problem = f"no field of {cls.__name__}; {hint}"
    return InvalidRequestError(f"{name}: {problem}", field=name, problems=[f"{problem} @ $.{name}"])


def _as_tuple(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)
