"""How an accepted operation is asked after on each wire: two small readers of answers, no I/O.

``retrieve`` does the polling; both wires look the same to it through ``Retrieval``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol
from urllib.parse import quote

import attrs

from tg_tinker.core.reply import Reply
from tg_tinker.errors import FutureCancelledError, OperationFailedError, ServerError, TGTinkerError
from tg_tinker.wire import loops, tg
from tg_tinker.wire.errors import from_wire
from tg_tinker.wire.route import Route

__all__ = ["Done", "Failed", "LoopsRetrieval", "Pending", "Retrieval", "TGRetrieval"]


@attrs.frozen
class Pending:
    """Not done: "pending" or "running"."""

    status: str


@attrs.frozen
class Done:
    """Done; ``result`` is the result's JSON."""

    result: Any


@attrs.frozen
class Failed:
    """Failed, or cancelled."""

    error: TGTinkerError


class Retrieval(Protocol):
    """One wire's way to accept, poll and cancel."""

    answers: ClassVar[frozenset[int]]  # the statuses of a poll that ``read`` understands

    def ticket(self, body: Any) -> str:
        """The id in a submit's answer. Raises ``ServerError`` where there is none."""
        ...

    def poll_path(self, ticket: str, wait: float) -> str:
        """The path that answers when the operation is done, or after ``wait`` seconds."""
        ...

    def read(self, reply: Reply) -> Pending | Done | Failed:
        """What a poll's answer says."""
        ...

    def cancel_path(self, ticket: str) -> str:
        """The path that a cancellation is posted to."""
        ...

    def cancelled(self, reply: Reply) -> bool:
        """Whether the answer to a cancellation says that the operation will not take effect."""
        ...


@attrs.frozen
class TGRetrieval:
    """``/v1/futures/{id}/result`` and ``/v1/futures/{id}/cancel``."""

    answers: ClassVar[frozenset[int]] = frozenset({200, 202, 408})

    def ticket(self, body: Any) -> str:
        """See ``Retrieval``."""
        return _named(body, "future_id")

    def poll_path(self, ticket: str, wait: float) -> str:
        """See ``Retrieval``."""
        return _held(tg.FUTURE_RESULT, "", ticket, wait)

    def read(self, reply: Reply) -> Pending | Done | Failed:
        """See ``Retrieval``."""
        if reply.status == 408:
            return Pending("pending")
        body = _object(reply.json())
        status = str(body.get("status", "pending"))
        if status == "completed":
            return Done(body.get("result"))
        if status not in tg.ENDED:
            return Pending("running" if status == "running" else "pending")
        error = body.get("error")
        fields = dict(error) if isinstance(error, Mapping) else {"message": str(error or "")}
        if status == "cancelled":
            fields.setdefault("code", FutureCancelledError.default_code)
        return Failed(_executed(fields))

    def cancel_path(self, ticket: str) -> str:
        """See ``Retrieval``."""
        return tg.FUTURE_CANCEL.url(id=ticket)

    def cancelled(self, reply: Reply) -> bool:
        """See ``Retrieval``."""
        return reply.status == 200 and _object(reply.json()).get("success") is True


@attrs.frozen
class LoopsRetrieval:
    """``/operations/{id}`` and ``/operations/{id}/cancel`` below a trainer's base URL."""

    base: str = ""
    answers: ClassVar[frozenset[int]] = frozenset({200, 202, loops.PENDING})

    def ticket(self, body: Any) -> str:
        """See ``Retrieval``."""
        return _named(body, "operation_id")

    def poll_path(self, ticket: str, wait: float) -> str:
        """See ``Retrieval``."""
        return _held(loops.OPERATION, self.base, ticket, wait)

    def read(self, reply: Reply) -> Pending | Done | Failed:
        """See ``Retrieval``."""
        if reply.status == loops.PENDING:
            return Pending("pending")
        body = _object(reply.json())
        if body.get("status") == "done":
            return Done(body.get("result"))
        if body.get("status") != "error":
            return Pending("running" if body.get("status") == "running" else "pending")
        known = {name: body[name] for name in ("code", "details", "request_id") if body.get(name)}
        return Failed(_executed({"message": str(body.get("error") or body.get("error_class") or ""), **known}))

    def cancel_path(self, ticket: str) -> str:
        """See ``Retrieval``."""
        return f"{self.base}{loops.OPERATION_CANCEL.url(id=ticket)}"

    def cancelled(self, reply: Reply) -> bool:
        """See ``Retrieval``."""
        return 200 <= reply.status < 300


def _held(route: Route[Any], base: str, ticket: str, wait: float) -> str:
    return f"{base}{route.url(id=ticket)}?wait={quote(f'{wait:.3f}')}"


def _named(body: Any, field: str) -> str:
    ticket = body.get(field) if isinstance(body, Mapping) else None
    if not isinstance(ticket, str) or not ticket:
        raise ServerError(f"the server accepted the operation without a {field}: {body!r}", code="BAD_ANSWER")
    return ticket


def _object(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise ServerError(f"the server's answer is not an object: {body!r}", code="BAD_ANSWER")
    return body


def _executed(fields: dict[str, Any]) -> TGTinkerError:
    """The error of an operation that was accepted: typed where the code is known, else ``OperationFailedError``."""
    error = from_wire({**fields, "message": fields.get("message") or "the operation failed"}, 500)
    if type(error) is not ServerError or (error.code == ServerError.default_code and "code" in fields):
        return error
    failed = OperationFailedError(error.message, request_id=error.request_id)
    failed.code = error.code if "code" in fields else failed.code
    failed.details.update(error.details)
    return failed
