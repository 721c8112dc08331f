"""The audit log: one hash chain per tenant in the database, each entry written exactly once, heads signed with Ed25519.

Entries hold keyed digests of inputs, never inputs. The pure half, which clients share, is ``tg_tinker.verify``.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import attrs
from sqlalchemy import insert, select

from tg_tinker.errors import InvalidRequestError
from tg_tinker.store import files
from tg_tinker.store.tables import audit
from tg_tinker.types import checks
from tg_tinker.types.results import AuditLogEntry
from tg_tinker.verify import AuditHead, genesis_hash, key_id_of, record_hash
from tg_tinker.wire import codec
from tg_tinker.wire.digest import canonical_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from tg_tinker.store.database import Database

ALTERED = "ENTRY_ALTERED"
#: what stands in columns of its own as well, to be found by
_COPIED = ("tenant_id", "sequence", "operation_id", "event", "training_client_id", "operation", "record_hash")


@attrs.frozen(kw_only=True)
class AuditEvent:
    """What happened, and when: an operation was accepted, or it ended. One of each per ``operation_id``."""

    tenant_id: str
    operation: str
    operation_id: str
    event: Literal["accepted", "ended"]
    training_client_id: str | None = None
    success: bool | None = None
    error_code: str | None = None
    error_message: str | None = None
    duration_ms: float | None = attrs.field(default=None, converter=attrs.converters.optional(float))
    input_digest: str | None = None
    artifact_ids_produced: tuple[str, ...] = ()
    artifact_ids_consumed: tuple[str, ...] = ()
    dp_metrics: dict[str, Any] | None = None
    timestamp: datetime = attrs.field(factory=lambda: datetime.now(UTC))


class HeadSigner:
    """The server's Ed25519 key for heads: made once, kept in a private file (0600)."""

    def __init__(self, path: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key = Ed25519PrivateKey.from_private_bytes(files.secret(path))
        self._public = self._key.public_key().public_bytes_raw()

    @property
    def public_key(self) -> str:
        """The public half, base64: what a client pins."""
        return base64.b64encode(self._public).decode()

    def sign(self, tenant_id: str, sequence: int, last_hash: str, at: datetime | None = None) -> AuditHead:
        """Sign the state of a tenant's chain."""
        unsigned = AuditHead(
            tenant_id=tenant_id,
            sequence=sequence,
            record_hash=last_hash,
            timestamp=(at or datetime.now(UTC)).astimezone(UTC),
            key_id=key_id_of(self._public),
            public_key=self.public_key,
            signature="",
        )
        return attrs.evolve(unsigned, signature=base64.b64encode(self._key.sign(unsigned.signed_bytes())).decode())


class AuditLog:
    """Every tenant's chain."""

    def __init__(self, database: Database, signer: HeadSigner) -> None:
        self._database = database
        self._signer = signer

    async def append(self, event: AuditEvent) -> AuditLogEntry:
        """Write one entry, durably; if this event is already in the chain, give back the entry it has."""
        (entry,) = await self.append_all([event])
        return entry

    async def append_all(self, events: Sequence[AuditEvent]) -> list[AuditLogEntry]:
        """Write several entries in one transaction, in this order: many cost hardly more than one."""
        written: dict[tuple[str, str, str], AuditLogEntry] = {}
        async with self._database.writing() as connection:
            for tenant_id in {event.tenant_id for event in events}:
                own = [event for event in events if event.tenant_id == tenant_id]
                written |= {_key(entry): entry for entry in await _known(connection, tenant_id, own)}
                last, rows = await _first(connection, _newest(tenant_id)), []
                for event in own:
                    if _key(event) not in written:
                        last = written[_key(event)] = _linked(event, last)
                        rows.append(_row(last))
                if rows:
                    await connection.execute(insert(audit), rows)
        return [written[_key(event)] for event in events]

    async def head(self, tenant_id: str) -> AuditHead:
        """Sign the chain as it stands."""
        async with self._database.reading() as connection:
            last = await _first(connection, _newest(tenant_id))
        if last is None:
            return self._signer.sign(tenant_id, 0, genesis_hash(tenant_id))
        return self.head_at(last)

    def head_at(self, entry: AuditLogEntry) -> AuditHead:
        """Sign the chain as it stood when this entry was written."""
        return self._signer.sign(entry.tenant_id, entry.sequence, entry.record_hash)

    async def entries(
        self,
        tenant_id: str,
        *,
        training_client_id: str | None = None,
        operation: str | None = None,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[AuditLogEntry]:
        """Entries in the order of the chain; only the unfiltered whole can be verified."""
        query = _of(tenant_id).order_by(audit.c.sequence).limit(limit).offset(offset)
        if training_client_id is not None:
            query = query.where(audit.c.training_client_id == training_client_id)
        if operation is not None:
            query = query.where(audit.c.operation == operation)
        if start_time is not None:
            query = query.where(audit.c.timestamp >= start_time)
        if end_time is not None:
            query = query.where(audit.c.timestamp <= end_time)
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).all()
        return await asyncio.to_thread(lambda: list(map(_entry, rows)))  # a long page would stall the loop


def _of(tenant_id: str) -> Select[Any]:
    return select(*(audit.c[name] for name in (*_COPIED, "entry"))).where(audit.c.tenant_id == tenant_id)


def _newest(tenant_id: str) -> Select[Any]:
    return _of(tenant_id).order_by(audit.c.sequence.desc()).limit(1)


def _key(event: AuditEvent | AuditLogEntry) -> tuple[str, str, str]:
    return event.tenant_id, event.operation_id, event.event


async def _known(connection: AsyncConnection, tenant_id: str, events: Sequence[AuditEvent]) -> list[AuditLogEntry]:
    """Find the entries of these events' operations, accepted and ended ones alike."""
    operations = sorted({event.operation_id for event in events})
    found = await connection.execute(_of(tenant_id).where(audit.c.operation_id.in_(operations)))
    return [_entry(row) for row in found]


async def _first(connection: AsyncConnection, query: Select[Any]) -> AuditLogEntry | None:
    found = (await connection.execute(query)).first()
    return None if found is None else _entry(found)


def _linked(event: AuditEvent, last: AuditLogEntry | None) -> AuditLogEntry:
    fields: dict[str, Any] = attrs.asdict(event, recurse=False)
    fields["timestamp"] = event.timestamp.astimezone(UTC)
    draft = AuditLogEntry(
        sequence=1 if last is None else last.sequence + 1,
        entry_id=f"aud-{secrets.token_hex(12)}",
        prev_hash=genesis_hash(event.tenant_id) if last is None else last.record_hash,
        record_hash="",
        **fields,
    )
    return attrs.evolve(draft, record_hash=record_hash(draft))


def _row(entry: AuditLogEntry) -> dict[str, Any]:
    return {
        **{name: getattr(entry, name) for name in (*_COPIED, "timestamp")},
        "entry": canonical_json(entry.to_dict()).decode(),
    }


def _entry(row: Row[Any]) -> AuditLogEntry:
    """Read a row. One that was changed keeps its place in the chain, and cannot match its hash: verifying names it."""
    columns = {name: getattr(row, name) for name in _COPIED}
    try:
        fields = codec.loads(str(row.entry).encode())
        entry = codec.decode(AuditLogEntry, fields)
        checks.refuse_unknown(AuditLogEntry, fields)
    except InvalidRequestError:
        return AuditLogEntry(**columns, **_UNREADABLE)
    if all(getattr(entry, name) == value for name, value in columns.items()):
        return entry
    return attrs.evolve(entry, **columns, error_code=ALTERED, error_message="its row in the database was changed")


_UNREADABLE: dict[str, Any] = {
    **{field.name: None for field in attrs.fields(AuditLogEntry) if field.name not in _COPIED},
    "entry_id": "unreadable",
    "timestamp": datetime.fromtimestamp(0, UTC),
    "error_code": ALTERED,
    "error_message": "what is stored of this entry cannot be read: it was changed",
    "artifact_ids_produced": (),
    "artifact_ids_consumed": (),
    "prev_hash": "",
}
