"""Writes the audit log as things happen: in order, in the background, each event once."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from tg_tinker.errors import TGTinkerError
from tg_tinker.server.tickets import Ticket

if TYPE_CHECKING:
    from tg_tinker.store.audit import AuditEvent, AuditLog

_log = logging.getLogger("tg_tinker.server")
_BATCH = 500  # events of one transaction
_LINGER = 0.1  # seconds that a write waits for more: the next operation, which goes first, is often just arriving
_RETRY = 5.0  # seconds until a write that failed is tried again


class Auditing:
    """One writer per server process. ``secret`` keys the digests of inputs, so that they tell outsiders nothing."""

    def __init__(self, log: AuditLog, secret: bytes) -> None:
        self.log = log
        self._secret = secret
        self._events: deque[AuditEvent] = deque()
        self._changed = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin writing."""
        self._task = asyncio.create_task(self._run(), name="audit")

    async def aclose(self) -> None:
        """Write what is left."""
        self._closing = True
        self._changed.set()
        if self._task is not None:
            await self._task

    def digest(self, route: str, body: bytes) -> str:
        """The keyed digest of an input."""
        return "hmac-sha256:" + hmac.digest(self._secret, route.encode() + b"\0" + body, "sha256").hex()

    def accepted(self, ticket: Ticket) -> None:
        """An operation was accepted."""
        self._add(ticket, "accepted", input_digest=ticket.digest)

    def ended(self, ticket: Ticket) -> None:
        """An operation ended, well or badly."""
        error = ticket.error()
        ended = ticket.completed_at or ticket.created_at
        self._add(
            ticket,
            "ended",
            success=error is None,
            **_failure(error),
            duration_ms=(ended - ticket.created_at).total_seconds() * 1e3,
            artifact_ids_produced=tuple(ticket.produced),
            artifact_ids_consumed=tuple(ticket.consumed),
            dp_metrics=ticket.dp_metrics,
        )

    def happened(
        self, tenant: str, operation: str, operation_id: str, error: TGTinkerError | None = None, **fields: Any
    ) -> None:
        """Something that is done in one go happened, or was refused."""
        from tg_tinker.store.audit import AuditEvent

        event = AuditEvent(
            tenant_id=tenant,
            operation=operation,
            operation_id=operation_id,
            event="ended",
            success=error is None,
            **_failure(error),
            **fields,
        )
        self._push(event)

    async def flush(self) -> None:
        """Wait until everything that has happened so far is in the log."""
        await self._written.wait()

    def _add(self, ticket: Ticket, event: Literal["accepted", "ended"], **fields: Any) -> None:
        from tg_tinker.store.audit import AuditEvent

        self._push(
            AuditEvent(
                tenant_id=ticket.tenant,
                operation=ticket.operation,
                operation_id=ticket.id,
                event=event,
                training_client_id=ticket.run_id,
                **fields,
            )
        )

    def _push(self, event: AuditEvent) -> None:
        self._events.append(event)
        self._written.clear()
        self._changed.set()

    async def _run(self) -> None:
        while not (self._closing and not self._events):
            await self._changed.wait()
            if not self._closing:
                await asyncio.sleep(_LINGER)
            self._changed.clear()
            try:
                while self._events:
                    await self._write()
                self._written.set()
            # A full disk, a locked database: the events wait, in order, and are written when it is well again.
            except Exception:  # noqa: BLE001
                _log.exception("the audit log could not be written; trying again in %s s", _RETRY)
                if self._closing:
                    return
                await asyncio.sleep(_RETRY)
                self._changed.set()

    async def _write(self) -> None:
        batch = list(islice(self._events, _BATCH))
        await self.log.append_all(batch)
        for _ in batch:
            self._events.popleft()


def _failure(error: TGTinkerError | None) -> dict[str, Any]:
    return {} if error is None else {"error_code": error.code, "error_message": error.message}
