"""The tenant that a client works for: as it was asked for, and as the server's answers tell."""

from __future__ import annotations

from collections.abc import Mapping

from tg_tinker.errors import AuthorizationError
from tg_tinker.wire import headers

__all__ = ["Tenant"]


class Tenant:
    """``name`` is None until it is known; a server that names another one than was asked for is refused."""

    def __init__(self, asked: str | None) -> None:
        self._asked = asked
        self.name = asked

    def hear(self, answered: Mapping[str, str]) -> None:
        """Learn it of the headers of an answer; raises as ``note`` does."""
        told = answered.get(headers.TENANT)
        if told is not None:
            self.note(told)

    def note(self, told: str) -> None:
        """Learn it of an answer. Raises ``AuthorizationError`` where another one was asked for."""
        if self._asked is not None and told != self._asked:
            message = f"the API key belongs to tenant {told!r}, not to tenant_id={self._asked!r}"
            raise AuthorizationError(message, details={"tenant_id": told})
        self.name = told
