"""Which server, which key, which limits: arguments first, then the environment, then the defaults.

It resolves and checks; it opens nothing. ``TG_TINKER_*`` goes before ``TS_*``; the Loops surface puts its own names
before both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

from tg_tinker.home import folder as home_folder
from tg_tinker.types import checks

__all__ = ["LOOPS_NAMES", "NAMES", "RETRY_COUNT", "TIMEOUT", "Settings", "resolve"]

Names = Mapping[str, tuple[str, ...]]

#: field -> environment variables, the first one set counts
NAMES: Names = {
    field: tuple(f"{prefix}_{field.upper()}" for prefix in ("TG_TINKER", "TS"))
    for field in ("api_key", "base_url", "tenant_id", "timeout", "retry_count", "verify_ssl")
}
#: the same for ``tg_tinker.loops``
LOOPS_NAMES: Names = {
    **NAMES,
    "api_key": ("BASETEN_API_KEY", *NAMES["api_key"]),
    "base_url": ("LOOPS_BASE_URL", *NAMES["base_url"]),
}


class DefaultFloat(float):
    """A default that can be told from the same number given by the caller, so that the environment may replace it."""

    __slots__ = ()


class DefaultInt(int):
    """The same for whole numbers."""

    __slots__ = ()


TIMEOUT = DefaultFloat(300.0)
RETRY_COUNT = DefaultInt(3)


def _fits_a_header(_: object, attribute: attrs.Attribute[Any], value: str | None) -> None:
    if value is not None and not value.isprintable():
        raise checks.refuse(attribute.name, "printable characters alone", "(not shown)")


@attrs.frozen(kw_only=True)
class Settings:
    """What a ``ServiceClient`` goes by. Without a ``base_url`` a server is run on this machine, in ``home``.

    ``timeout`` bounds the server's silence on one HTTP request (seconds), ``ready_timeout`` the start of a server or a
    run; ``retry_count`` is how often a request is tried again, within 60 s or ``timeout``, whichever is shorter. The
    wait for an operation's result is bounded by ``result(timeout)`` alone.
    """

    api_key: str | None = attrs.field(default=None, repr=False, validator=_fits_a_header)
    base_url: str | None = None
    tenant_id: str | None = attrs.field(default=None, validator=_fits_a_header)
    timeout: float = attrs.field(default=float(TIMEOUT), validator=checks.number(above=0.0))
    ready_timeout: float = attrs.field(default=600.0, validator=checks.number(above=0.0))
    retry_count: int = attrs.field(default=int(RETRY_COUNT), validator=checks.integer(0, 100))
    verify_ssl: bool = attrs.field(default=True, validator=checks.flag())
    home: Path = attrs.field(factory=home_folder)


def resolve(
    api_key: str | None = None,
    base_url: str | None = None,
    *,
    tenant_id: str | None = None,
    timeout: float = TIMEOUT,
    retry_count: int = RETRY_COUNT,
    ready_timeout: float = 600.0,
    verify_ssl: bool | None = None,
    home: str | os.PathLike[str] | None = None,
    names: Names = NAMES,
) -> Settings:
    """Combine arguments and environment; an ``api_key`` that is a URL is taken as the ``base_url``.

    Raises ``InvalidRequestError`` naming the field; a key or tenant without a URL is one of these.
    """
    if home is not None and not isinstance(home, str | os.PathLike):
        raise checks.refuse("home", "a folder, or None", home)
    api_key, base_url = _in_order(_text("api_key", api_key), _text("base_url", base_url))
    given: dict[str, Any] = {
        "api_key": api_key or _variable(names, "api_key"),
        "base_url": base_url or _variable(names, "base_url"),
        "tenant_id": _text("tenant_id", tenant_id) or _variable(names, "tenant_id"),
    }
    if given["base_url"] is None:
        _refuse_without_url(given, names)
    else:
        given["base_url"] = _url(given["base_url"])
    return Settings(
        **given,
        timeout=_number("timeout", timeout, names),
        retry_count=_count("retry_count", retry_count, names),
        ready_timeout=ready_timeout,
        verify_ssl=_flag(names) if verify_ssl is None else verify_ssl,
        home=home_folder(home),
    )


def _in_order(first: str | None, second: str | None) -> tuple[str | None, str | None]:
    """Key and URL, whichever way round they were given."""
    if first is None or not _is_url(first):
        return first, second
    if second is not None and _is_url(second):
        raise checks.refuse("api_key", "one URL, not two", first)
    return second, first


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise checks.refuse("base_url", 'a URL such as "https://host:port"', text)
    return text.rstrip("/")


def _refuse_without_url(given: Mapping[str, str | None], names: Names) -> None:
    for field in ("api_key", "tenant_id"):
        if given[field] is not None:
            sources, urls = " or ".join(names[field]), " or ".join(names["base_url"])
            wanted = (
                f"base_url (or {urls}) beside {field} (given, or set by {sources}): give the URL of the server that "
                f"knows it, or no {field} to run a server on this machine"
            )
            raise checks.refuse("base_url", wanted, None)


def _text(field: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        shown = "(not shown)" if field == "api_key" else value
        raise checks.refuse(field, "a non-empty string", shown)
    return value.strip()


def _variable(names: Names, field: str) -> str | None:
    values = (os.environ.get(name, "").strip() for name in names[field])
    return next((value for value in values if value), None)


def _number(field: str, value: float, names: Names) -> float:
    text = _variable(names, field) if isinstance(value, DefaultFloat) else None
    try:
        return value if text is None else float(text)
    except ValueError:
        raise checks.refuse(field, f"a number in {' or '.join(names[field])}", text) from None


def _count(field: str, value: int, names: Names) -> int:
    text = _variable(names, field) if isinstance(value, DefaultInt) else None
    try:
        return value if text is None else int(text)
    except ValueError:
        raise checks.refuse(field, f"a whole number in {' or '.join(names[field])}", text) from None


def _flag(names: Names) -> bool:
    text = (_variable(names, "verify_ssl") or "true").lower()
    if text not in {"true", "1", "yes", "false", "0", "no"}:
        raise checks.refuse("verify_ssl", f"true or false in {' or '.join(names['verify_ssl'])}", text)
    return text in {"true", "1", "yes"}
