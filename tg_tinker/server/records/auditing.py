"""Writes the audit log as things happen: in order, in the background, each event once, and signs what it wrote."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any, Literal

from tg_tinker.errors import InvalidRequestError, TGTinkerError
from tg_tinker.server.records.background_writer import BackgroundWriter
from tg_tinker.server.records.tickets import Ticket
from tg_tinker.wire import codec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tg_tinker.store.audit import AuditEvent, AuditLog
    from tg_tinker.types.results import AuditLogEntry
    from tg_tinker.verify import AuditHead


class Auditing:
    """One writer per server process. ``secret`` keys the digests of inputs, so that they tell outsiders nothing."""

    def __init__(self, log: AuditLog, secret: bytes) -> None:
        self.log = log
        self._secret = secret
        self._writer: BackgroundWriter[AuditEvent] = BackgroundWriter("the audit log", self._write, self._give_up)
        self._heads: dict[str, tuple[int, str]] = {}  # by tenant: how many entries, and the signed head in JSON

    def start(self) -> None:
        """Begin writing."""
        self._writer.start()

    async def aclose(self) -> bool:
        """Write what is left; whether nothing was lost."""
        return await self._writer.aclose()

    def digest(self, route: str, body: bytes) -> str:
        """The keyed digest of an input."""
        return "hmac-sha256:" + hmac.digest(self._secret, route.encode() + b"\0" + body, "sha256").hex()

    async def find_head(self, tenant: str) -> None:
        """See to it that there is a ``head``, also where this process has written nothing into the tenant's log yet."""
        if tenant not in self._heads:
            self._keep(await self.log.head(tenant))

    def head(self, tenant: str) -> str | None:
        """The signed head, in JSON, of a tenant's log, as this process wrote it last, or else found it."""
        return self._heads.get(tenant, (0, None))[1]

    def accepted(self, ticket: Ticket) -> AuditEvent:
        """An operation was accepted; returns what will be written."""
        return self._note(_event(ticket, "accepted", timestamp=ticket.created_at, input_digest=ticket.digest))

    def ended(self, ticket: Ticket) -> AuditEvent:
        """An operation ended, well or badly; returns what will be written."""
        error = ticket.error()
        ended = ticket.completed_at or ticket.created_at
        event = _event(
            ticket,
            "ended",
            timestamp=ended,
            success=error is None,
            **failure(error),
            duration_ms=(ended - ticket.created_at).total_seconds() * 1e3,
            artifact_ids_produced=tuple(ticket.produced),
            artifact_ids_consumed=tuple(ticket.consumed),
            dp_metrics=ticket.dp_metrics,
        )
        return self._note(event)

    async def happened(
        self, tenant: str, operation: str, operation_id: str, error: TGTinkerError | None = None, **fields: Any
    ) -> None:
        """Something that is done in one go happened, or was refused; returns when the entry is durable.

        Raises ``ServerError`` if that takes too long.
        """
        from tg_tinker.store.audit import AuditEvent

        event = AuditEvent(
            tenant_id=tenant,
            operation=operation,
            operation_id=operation_id,
            event="ended",
            success=error is None,
            **failure(error),
            **fields,
        )
        self._note(event)
        await self.flush()

    async def flush(self) -> None:
        """Wait until everything that has happened so far is in the log. Raises ``ServerError`` if it takes too long."""
        await self._writer.flush()

    def _note(self, event: AuditEvent) -> AuditEvent:
        self._writer.put((event.tenant_id, event.operation_id, event.event), event)
        return event

    async def _write(self, events: Sequence[AuditEvent]) -> None:
        entries = await self.log.append_all(events)
        for entry in {entry.tenant_id: entry for entry in entries}.values():
            self._sign(entry)

    def _sign(self, entry: AuditLogEntry) -> None:
        """Sign the log up to an entry, once for all the answers that bring the head to clients."""
        if entry.sequence > self._heads.get(entry.tenant_id, (0, ""))[0]:
            self._keep(self.log.head_at(entry))

    def _keep(self, head: AuditHead) -> None:
        if head.sequence > self._heads.get(head.tenant_id, (-1, ""))[0]:
            self._heads[head.tenant_id] = head.sequence, codec.dumps(head.to_dict()).decode()

    async def _give_up(self, event: AuditEvent, error: Exception) -> None:
        """Write an entry that says that this one could not be encoded, so that the count stays true."""
        message = f"the entry of this event could not be encoded ({type(error).__name__}); the server's log says why"
        told = ("tenant_id", "operation", "operation_id", "event", "training_client_id", "timestamp", "success")
        bare = {name: getattr(event, name) for name in told}
        await self._write([type(event)(**bare, error_code="ENTRY_NOT_ENCODED", error_message=message)])


def _event(ticket: Ticket, event: Literal["accepted", "ended"], **fields: Any) -> AuditEvent:
    from tg_tinker.store.audit import AuditEvent

    return AuditEvent(
        tenant_id=ticket.tenant,
        operation=ticket.operation,
        operation_id=ticket.id,
        event=event,
        training_client_id=ticket.run_id,
        **fields,
    )


def failure(error: TGTinkerError | None) -> dict[str, Any]:
    """What the log says of an error: of a refused request where and what was expected, for what came is an input."""
    if error is None:
        return {}
    message = error.message
    if isinstance(error, InvalidRequestError) and error.constraint is not None:
        message = f"{error.field or 'request'}: expected {error.constraint}"
    return {"error_code": error.code, "error_message": message}
