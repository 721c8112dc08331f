"""Check an audit log without trusting the server that gave it: pure functions over entries and signed heads.

A tenant's entries form one hash chain; a head is the server's signature under its length and last hash. A client that
keeps heads holds evidence against truncation and rewriting. Not for writing logs (``store.audit``).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import TypeVar

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import arguments, checks
from tg_tinker.types.results import AuditLogEntry
from tg_tinker.types.value import Value
from tg_tinker.wire.digest import canonical_json, sha256_hex

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class AuditHead(Value):
    """Signed by the server: at ``timestamp`` the tenant's chain had ``sequence`` entries, the last ``record_hash``.

    ``public_key`` (Ed25519) and ``signature`` are base64; ``key_id`` is the public key's fingerprint.
    """

    tenant_id: str
    sequence: int
    record_hash: str
    timestamp: datetime
    key_id: str
    public_key: str
    signature: str

    def signed_bytes(self) -> bytes:
        """Encode what the signature covers: every other field."""
        fields = self.to_dict()
        del fields["signature"]
        return canonical_json({"format": "tg-audit-head/1", **fields})


@attrs.frozen(kw_only=True)
class AuditVerification(Value):
    """Outcome of a check; ``first_bad`` numbers the first entry that is changed, missing or unproven.

    ``entry_id`` is of the entry that is there in its place, if one is.
    """

    ok: bool
    entries: int
    first_bad: int | None = None
    entry_id: str | None = None
    reason: str | None = None


def genesis_hash(tenant_id: str) -> str:
    """Give the ``prev_hash`` of a tenant's first entry."""
    return sha256_hex(canonical_json({"format": "tg-audit/1", "tenant_id": tenant_id}))


def record_hash(entry: AuditLogEntry) -> str:
    """Hash every field of an entry but ``record_hash``; ``prev_hash`` is one of them, and that makes the chain."""
    fields = entry.to_dict()
    del fields["record_hash"]
    return sha256_hex(canonical_json(fields))


def key_id_of(public_key: bytes) -> str:
    """Name a signing key by the fingerprint of its public half."""
    return "audit-" + sha256_hex(public_key).removeprefix("sha256:")[:24]


def verify_audit_log(
    entries: Iterable[AuditLogEntry],
    *,
    tenant_id: str,
    heads: Sequence[AuditHead] = (),
    public_key: str | None = None,
) -> AuditVerification:
    """Recompute a tenant's whole chain from its first entry and hold it against heads that were kept.

    ``public_key`` pins the signing key (base64), otherwise the first head's is taken. Raises ``InvalidRequestError``
    naming what is no entry or head, or (code EXTRA_MISSING) if heads are given and ``cryptography`` is not installed.
    """
    hashes, ids = [genesis_hash(arguments.text("tenant_id", tenant_id))], ["genesis"]
    heads = list(_each(AuditHead, "heads", heads))
    for entry in _each(AuditLogEntry, "entries", entries):
        problem = _problem(entry, tenant_id, len(hashes), hashes[-1])
        if problem is not None:
            # A gap shows at the entry that should have stood here.
            return AuditVerification(
                ok=False, entries=len(hashes) - 1, first_bad=len(hashes), entry_id=entry.entry_id, reason=problem
            )
        hashes.append(entry.record_hash)
        ids.append(entry.entry_id)
    for head in sorted(heads, key=lambda kept: kept.sequence):
        problem = _head_problem(head, tenant_id, hashes, public_key or heads[0].public_key)
        if problem is not None:
            bad = max(1, min(head.sequence, len(hashes)))
            known = ids[bad] if bad < len(ids) else None
            return AuditVerification(ok=False, entries=len(hashes) - 1, first_bad=bad, entry_id=known, reason=problem)
    return AuditVerification(ok=True, entries=len(hashes) - 1)


def _each(kind: type[T], field: str, values: Iterable[T]) -> Iterator[T]:
    if not isinstance(values, Iterable):
        raise checks.refuse(field, f"{kind.__name__} values", values)
    for index, value in enumerate(values):
        if not isinstance(value, kind):
            raise checks.refuse(f"{field}[{index}]", f"an {kind.__name__}", value)
        yield value


def _problem(entry: AuditLogEntry, tenant_id: str, sequence: int, previous: str) -> str | None:
    if entry.tenant_id != tenant_id:
        return "it belongs to another tenant"
    if entry.sequence != sequence:
        return f"entry {sequence} is missing, or entries are out of order"
    if record_hash(entry) != entry.record_hash:
        return "its fields do not match its hash: it was changed"
    if entry.prev_hash != previous:
        return "it does not follow the entry before it: entries were removed, inserted or rewritten"
    return None


def _head_problem(head: AuditHead, tenant_id: str, hashes: Sequence[str], public_key: str) -> str | None:
    if head.public_key != public_key or not _signature_holds(head):
        return f"the head at entry {head.sequence} is not signed by the expected key"
    if head.tenant_id != tenant_id:
        return f"the head at entry {head.sequence} is another tenant's"
    if head.sequence >= len(hashes):
        return f"the log was truncated: {head.sequence} entries were signed for, {len(hashes) - 1} are there"
    if hashes[head.sequence] != head.record_hash:
        return f"entry {head.sequence}, or one before it, was rewritten after its head was signed"
    return None


def _signature_holds(head: AuditHead) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        message = "checking signed heads needs cryptography: pip install 'tg-tinker[verify]'"
        raise InvalidRequestError(message, code="EXTRA_MISSING") from error
    try:
        raw = base64.b64decode(head.public_key, validate=True)
        Ed25519PublicKey.from_public_bytes(raw).verify(base64.b64decode(head.signature), head.signed_bytes())
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return head.key_id == key_id_of(raw)
