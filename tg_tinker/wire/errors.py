"""Errors as they cross HTTP: from ``{code, message, details, request_id}`` and a status back to a class of the tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tg_tinker.errors import (
    AuthenticationError,
    AuthorizationError,
    InvalidRequestError,
    RateLimitedError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
    restore,
)

__all__ = ["from_wire"]


def _tree(cls: type[TGTinkerError]) -> list[type[TGTinkerError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in _tree(child))]


_BY_CODE = {cls.default_code: cls for cls in _tree(TGTinkerError)}
_BY_STATUS: dict[int, type[TGTinkerError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: AuthorizationError,
    404: ResourceNotFoundError,
    409: TGTinkerError,  # some conflict; only the code can say which
    413: InvalidRequestError,
    422: InvalidRequestError,
    429: RateLimitedError,
}


def from_wire(body: Mapping[str, Any], status: int = 500) -> TGTinkerError:
    """Rebuild the error of a response: by its code where that is known, else by the HTTP status."""
    code = str(body.get("code") or "")
    details = body.get("details")
    details = dict(details) if isinstance(details, dict) else {}
    cls = _BY_CODE.get(code) or _by_shape(code, details) or _BY_STATUS.get(status, ServerError)
    message = str(body.get("message") or f"the server answered with status {status}")
    return restore(cls, message, code or cls.default_code, details, body.get("request_id"))


def _by_shape(code: str, details: Mapping[str, Any]) -> type[TGTinkerError] | None:
    """The class of an error whose code is not its class's own, such as RUN_NOT_FOUND or RUN_COMPLETED."""
    if code.endswith("_NOT_FOUND"):
        return ResourceNotFoundError
    return InvalidRequestError if {"field", "constraint", "problems"} <= details.keys() else None
