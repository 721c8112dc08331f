"""What a server answered, read tolerantly: our error bodies, foreign ones, and no body at all."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import attrs

from tg_tinker.errors import InvalidRequestError, ServerError, TGTinkerError
from tg_tinker.wire import codec, headers
from tg_tinker.wire.errors import from_wire

__all__ = ["Reply"]

_SHOWN = 300  # characters of a body that is not JSON


@attrs.frozen
class Reply:
    """Status, headers (case-insensitive) and body of one answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as plain data. Raises ``ServerError`` where it is not JSON."""
        try:
            return codec.loads(self.body)
        except InvalidRequestError as error:
            message = f"the server's answer (status {self.status}) is not JSON: {self._text()!r}"
            raise ServerError(message, code="BAD_ANSWER", request_id=self._request_id()) from error

    def error(self) -> TGTinkerError:
        """The typed error of an answer that is not a success."""
        fields = self._fields()
        fields.setdefault("request_id", self._request_id())
        after = self.retry_after()
        if after is not None:
            fields["details"] = {"retry_after": after, **(fields.get("details") or {})}
        return from_wire(fields, self.status)

    def retry_after(self) -> float | None:
        """Seconds that the server asks to wait, from the header's seconds or date."""
        value = self.headers.get(headers.RETRY_AFTER)
        if value is None:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            return _until(value)

    def _fields(self) -> dict[str, Any]:
        """Ours is ``{"error": {...}}``; others say ``{"error": "..."}``, ``{"detail": ...}``, or plain text."""
        try:
            data = codec.loads(self.body)
        except InvalidRequestError:
            text = self._text()
            if text.startswith("<"):
                text = f"a web page came with status {self.status}: does the URL lead to the server? {text!r}"
            return {"message": text or None}
        error = data.get("error", data) if isinstance(data, dict) else data
        if not isinstance(error, dict):
            return {"message": str(error)}
        message = error.get("message") or error.get("detail") or error.get("error")
        details = error.get("details")
        return {**error, "message": message, "details": details if isinstance(details, dict) else {}}

    def _request_id(self) -> str | None:
        return self.headers.get(headers.REQUEST_ID)

    def _text(self) -> str:
        text = self.body[: 4 * _SHOWN].decode("utf-8", "replace").strip()
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _until(date: str) -> float | None:
    try:
        when = parsedate_to_datetime(date)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
