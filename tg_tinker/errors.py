"""Every error this package raises, as one tree. How they cross HTTP is in ``wire.errors``.

    TGTinkerError                    .code .message .details .request_id
    ├── AuthenticationError          401
    ├── AuthorizationError           403
    ├── InvalidRequestError          422, also a ValueError      .field .constraint .problems
    ├── ResourceNotFoundError        404, also a LookupError     .resource_type .resource_id
    ├── QuotaExceededError           403                         .used_bytes .needed_bytes .allowed_bytes
    ├── RateLimitedError             429                         .retry_after
    ├── QueueFullError               503                         .retry_after
    ├── DPBudgetExceededError        400   .current_epsilon .max_epsilon .projected_epsilon .delta
    ├── FutureTimeoutError           also a TimeoutError         .future_id .timeout
    ├── FutureCancelledError         409                         .future_id
    ├── OperationFailedError         the operation failed while executing  .operation
    ├── SamplerNotReadyError         also a RuntimeError         .version .waited
    ├── ServerError                  5xx
    │   └── ServerRestartedError     the server that held the operation is gone  .exit_code .log_tail
    ├── ServerUnreachableError       also a ConnectionError      .url
    ├── ClientClosedError            also a RuntimeError
    └── BlockingCallError            also a RuntimeError

The attributes beside a class live in ``details``, so they cross HTTP and pickling unchanged.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "AuthenticationError",
    "AuthorizationError",
    "BlockingCallError",
    "BlockingCallWarning",
    "ClientClosedError",
    "DPBudgetExceededError",
    "FutureCancelledError",
    "FutureTimeoutError",
    "InvalidRequestError",
    "OperationFailedError",
    "QueueFullError",
    "QuotaExceededError",
    "RateLimitedError",
    "ResourceNotFoundError",
    "SamplerNotReadyError",
    "ServerError",
    "ServerRestartedError",
    "ServerUnreachableError",
    "TGTinkerError",
    "UnretrievedOperationWarning",
    "restore",
]

T = TypeVar("T")


class _Detail(Generic[T]):
    """An attribute of an error that is kept in ``details`` under its own name."""

    def __init__(self, default: T) -> None:
        self._default = default
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, error: TGTinkerError | None, owner: type) -> T:
        if error is None:
            return self._default
        return cast("T", error.details.get(self._name, self._default))


class TGTinkerError(Exception):
    """The root of the tree: catch it to catch everything this package raises on purpose."""

    default_code: ClassVar[str] = "TG_TINKER_ERROR"
    http_status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.details: dict[str, Any] = dict(details or {})
        self.request_id = request_id

    def __str__(self) -> str:
        """The message, followed by the request id where there is one."""
        return f"{self.message} (request_id: {self.request_id})" if self.request_id else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by fields, so that keyword-only constructors survive the trip."""
        return restore, (type(self), self.message, self.code, self.details, self.request_id)

    def to_wire(self) -> dict[str, Any]:
        """The body of an HTTP error response: ``{"error": {code, message, details, request_id}}``."""
        fields = {"code": self.code, "message": self.message, "details": self.details, "request_id": self.request_id}
        return {"error": fields}


class AuthenticationError(TGTinkerError):
    """The API key is missing, unknown, expired or revoked."""

    default_code = "AUTHENTICATION_REQUIRED"
    http_status = 401


class AuthorizationError(TGTinkerError):
    """The API key is good, but not for this."""

    default_code = "PERMISSION_DENIED"
    http_status = 403


class InvalidRequestError(TGTinkerError, ValueError):
    """An argument is wrong: ``field`` says which, ``constraint`` what was expected.

    ``problems`` lists every fault that was found, each as ``"message @ $.data[3].tokens"``.
    """

    default_code = "VALIDATION_ERROR"
    http_status = 422
    field = _Detail[str | None](None)
    constraint = _Detail[str | None](None)
    problems = _Detail["Sequence[str]"](())

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        constraint: str | None = None,
        problems: Sequence[str] = (),
        code: str | None = None,
        request_id: str | None = None,
    ) -> None:
        details = {"field": field, "constraint": constraint, "problems": list(problems)}
        super().__init__(message, code=code, details=details, request_id=request_id)


class ResourceNotFoundError(TGTinkerError, LookupError):
    """There is no such thing, or it belongs to somebody else."""

    default_code = "NOT_FOUND"
    http_status = 404
    resource_type = _Detail[str | None](None)
    resource_id = _Detail[str | None](None)

    def __init__(self, message: str, *, resource_type: str, resource_id: str, request_id: str | None = None) -> None:
        details = {"resource_type": resource_type, "resource_id": resource_id}
        super().__init__(message, code=f"{resource_type.upper()}_NOT_FOUND", details=details, request_id=request_id)


class QuotaExceededError(TGTinkerError):
    """The checkpoint has no room beside those that are stored: delete some, or save with a time to live."""

    default_code = "QUOTA_EXCEEDED"
    http_status = 403
    used_bytes = _Detail[int](0)
    needed_bytes = _Detail[int](0)
    allowed_bytes = _Detail[int](0)

    def __init__(
        self, message: str, *, used_bytes: int, needed_bytes: int, allowed_bytes: int, request_id: str | None = None
    ) -> None:
        details = {"used_bytes": used_bytes, "needed_bytes": needed_bytes, "allowed_bytes": allowed_bytes}
        super().__init__(message, details=details, request_id=request_id)


class RateLimitedError(TGTinkerError):
    """Too many requests: try again after ``retry_after`` seconds."""

    default_code = "RATE_LIMITED"
    http_status = 429
    retry_after = _Detail[float | None](None)

    def __init__(self, message: str, *, retry_after: float | None = None, request_id: str | None = None) -> None:
        super().__init__(message, details={"retry_after": retry_after}, request_id=request_id)


class QueueFullError(TGTinkerError):
    """The server's queue for this tenant is full: try again after ``retry_after`` seconds."""

    default_code = "QUEUE_FULL"
    http_status = 503
    retry_after = _Detail[float | None](None)

    def __init__(self, message: str, *, retry_after: float | None = None, request_id: str | None = None) -> None:
        super().__init__(message, details={"retry_after": retry_after}, request_id=request_id)


class DPBudgetExceededError(TGTinkerError):
    """The step would spend more privacy than the budget allows; nothing was changed.

    ``current_epsilon`` and ``projected_epsilon`` are None where ε is infinite: JSON has no infinity.
    """

    default_code = "DP_BUDGET_EXCEEDED"
    http_status = 400
    current_epsilon = _Detail[float | None](None)
    max_epsilon = _Detail[float](0.0)
    projected_epsilon = _Detail[float | None](None)
    delta = _Detail[float](0.0)

    def __init__(
        self,
        message: str,
        *,
        current_epsilon: float | None,
        max_epsilon: float,
        projected_epsilon: float | None,
        delta: float,
        request_id: str | None = None,
    ) -> None:
        details = {
            "current_epsilon": _finite(current_epsilon),
            "max_epsilon": max_epsilon,
            "projected_epsilon": _finite(projected_epsilon),
            "delta": delta,
        }
        super().__init__(message, details=details, request_id=request_id)


class FutureTimeoutError(TGTinkerError, TimeoutError):
    """The wait ended after ``timeout`` seconds; the operation goes on and can be awaited again."""

    default_code = "FUTURE_TIMEOUT"
    http_status = 408
    future_id = _Detail[str | None](None)
    timeout = _Detail[float | None](None)

    def __init__(self, message: str, *, future_id: str | None = None, timeout: float | None = None) -> None:
        super().__init__(message, details={"future_id": future_id, "timeout": timeout})


class FutureCancelledError(TGTinkerError):
    """The operation was cancelled, before it ran or while it could still be stopped; it had no effect."""

    default_code = "FUTURE_CANCELLED"
    http_status = 409
    future_id = _Detail[str | None](None)

    def __init__(self, message: str, *, future_id: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message, details={"future_id": future_id}, request_id=request_id)


class OperationFailedError(TGTinkerError):
    """The operation was accepted and failed while it executed; the run stays usable."""

    default_code = "OPERATION_FAILED"
    http_status = 500
    operation = _Detail[str | None](None)

    def __init__(
        self, message: str, *, operation: str | None = None, code: str | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(message, code=code, details={"operation": operation}, request_id=request_id)


class SamplerNotReadyError(TGTinkerError, RuntimeError):
    """No sampler served the published ``version`` within the ceiling of ``waited`` seconds."""

    default_code = "SAMPLER_NOT_READY"
    http_status = 503
    version = _Detail[int | None](None)
    waited = _Detail[float | None](None)

    def __init__(self, message: str, *, version: int | None = None, waited: float | None = None) -> None:
        super().__init__(message, details={"version": version, "waited": waited})


class ServerError(TGTinkerError):
    """The server failed in a way that is not the caller's doing."""

    default_code = "INTERNAL_ERROR"
    http_status = 500


class ServerRestartedError(ServerError):
    """The server that held the operation ended before the operation did."""

    default_code = "SERVER_RESTARTED"
    http_status = 410
    exit_code = _Detail[int | None](None)
    log_tail = _Detail[str]("")

    def __init__(
        self, message: str, *, exit_code: int | None = None, log_tail: str = "", request_id: str | None = None
    ) -> None:
        super().__init__(message, details={"exit_code": exit_code, "log_tail": log_tail}, request_id=request_id)


class ServerUnreachableError(TGTinkerError, ConnectionError):
    """No server answers at ``url``."""

    default_code = "SERVER_UNREACHABLE"
    http_status = 503
    url = _Detail[str | None](None)

    def __init__(self, message: str, *, url: str | None = None) -> None:
        super().__init__(message, details={"url": url})


class ClientClosedError(TGTinkerError, RuntimeError):
    """The client was closed; make a new one."""

    default_code = "CLIENT_CLOSED"


class BlockingCallError(TGTinkerError, RuntimeError):
    """A blocking call on the client's own event loop would wait for itself for ever; await instead."""

    default_code = "BLOCKING_CALL"


class BlockingCallWarning(RuntimeWarning):
    """A blocking call stalls the running event loop; the ``*_async`` twin would not."""


class UnretrievedOperationWarning(RuntimeWarning):
    """An operation failed and nobody looked at the failure."""


def _finite(epsilon: float | None) -> float | None:
    return epsilon if epsilon is not None and math.isfinite(epsilon) else None


def restore(
    cls: type[TGTinkerError], message: str, code: str, details: dict[str, Any], request_id: str | None
) -> TGTinkerError:
    """Make an error of its fields, as they were kept or sent: the constructors would derive them anew."""
    error = cls.__new__(cls)
    TGTinkerError.__init__(error, message, code=code, details=details, request_id=request_id)
    return error
