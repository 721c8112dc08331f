"""Signed heads of the audit log, kept as a server's answers bring them: what its log is held against later."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tg_tinker.errors import InvalidRequestError
from tg_tinker.wire import codec
from tg_tinker.wire.headers import AUDIT_HEAD

if TYPE_CHECKING:
    from tg_tinker.verify import AuditHead

__all__ = ["Evidence"]

_logger = logging.getLogger("tg_tinker.service")
RECENT = EARLIER = 64  # heads kept of each kind


class Evidence:
    """The newest heads and an even spread of earlier ones, the first among them.

    The newest alone would not do: a log that was cut off and has grown again brings a newer head with it.
    """

    def __init__(self) -> None:
        self._recent: deque[AuditHead] = deque()
        self._earlier: list[AuditHead] = []
        self._aged = 0  # heads that were recent once
        self._stride = 1  # each so many of those are kept
        self._last: str | None = None

    @property
    def heads(self) -> tuple[AuditHead, ...]:
        """What was kept, oldest first."""
        return (*self._earlier, *self._recent)

    def hear(self, headers: Mapping[str, str]) -> None:
        """Keep the head that an answer brings; most bring the one before again, and cost nothing."""
        told = headers.get(AUDIT_HEAD)
        if told is not None and told != self._last:
            self._last = told
            self._keep(told)

    def _keep(self, told: str) -> None:
        from tg_tinker.verify import AuditHead

        try:
            head = codec.decode(AuditHead, codec.loads(told.encode()))
        except InvalidRequestError as error:
            _logger.warning("an answer brought a head of the audit log that cannot be read: %s", error)
            return
        self._recent.append(head)
        if len(self._recent) > RECENT:
            self._age(self._recent.popleft())

    def _age(self, head: AuditHead) -> None:
        if self._aged % self._stride == 0:
            self._earlier.append(head)
        self._aged += 1
        if len(self._earlier) > EARLIER:
            self._earlier, self._stride = self._earlier[::2], 2 * self._stride
