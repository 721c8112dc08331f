from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
from sqlalchemy import delete, update

from tg_tinker.errors import InvalidRequestError
from tg_tinker.store.audit import AuditEvent, AuditLog, HeadSigner
from tg_tinker.store.database import Database
from tg_tinker.store.sqlite import sqlite_url
from tg_tinker.store.tables import audit
from tg_tinker.types.results import AuditLogEntry
from tg_tinker.verify import AuditHead, genesis_hash, record_hash, verify_audit_log
from tg_tinker.wire.codec import decode, dumps, loads

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def event(operation_id: str = "op-1", tenant: str = "acme", **changes: Any) -> AuditEvent:
    """Make an event."""
    fields: dict[str, Any] = {"operation": "optim_step", "event": "accepted", "training_client_id": "tc-1"}
    return AuditEvent(tenant_id=tenant, operation_id=operation_id, **{**fields, **changes})


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[AuditLog]:
    """Open an empty log."""
    database = await Database.open(sqlite_url(tmp_path / "test.db"))
    yield AuditLog(database, HeadSigner(tmp_path / "keys" / "audit.key"))
    await database.close()


async def filled(log: AuditLog, count: int = 6) -> list[AuditLogEntry]:
    """Write entries and read them back."""
    for number in range(count):
        await log.append(event(f"op-{number}", duration_ms=number, dp_metrics={"epsilon_spent": 0.1}))
    return await log.entries("acme", limit=1000)


async def test_entries_form_a_chain(log: AuditLog) -> None:
    """Each entry follows the hash of the one before, the first the tenant's genesis, and the whole verifies."""
    entries = await filled(log)
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5, 6]
    previous = [genesis_hash("acme"), *(entry.record_hash for entry in entries)]
    assert [entry.prev_hash for entry in entries] == previous[:-1]
    report = verify_audit_log(entries, tenant_id="acme", heads=[await log.head("acme")])
    assert (report.ok, report.entries, report.first_bad) == (True, 6, None)


async def test_every_field_is_covered(log: AuditLog) -> None:
    """Changing any field of an entry, errors and DP metrics included, names that entry as the first bad one."""
    entries = await filled(log)
    changes: dict[str, Any] = {
        "entry_id": "x",
        "training_client_id": None,
        "operation": "x",
        "operation_id": "x",
        "event": "x",
        "timestamp": NOW,
        "success": True,
        "error_code": "x",
        "error_message": "x",
        "duration_ms": 0.5,
        "input_digest": "x",
        "artifact_ids_produced": ("x",),
        "artifact_ids_consumed": ("x",),
        "dp_metrics": {"epsilon_spent": 0.2},
        "prev_hash": "x",
        "record_hash": "x",
        "sequence": 9,
        "tenant_id": "x",
    }
    assert changes.keys() == {field.name for field in attrs.fields(AuditLogEntry)}
    for name, value in changes.items():
        changed = [*entries[:3], attrs.evolve(entries[3], **{name: value}), *entries[4:]]
        report = verify_audit_log(changed, tenant_id="acme")
        assert (report.ok, report.first_bad, report.entries) == (False, 4, 3), name


async def test_a_rewritten_tail_needs_a_kept_head_to_be_found(log: AuditLog) -> None:
    """An insider who recomputes all hashes after a change is caught by a head from before."""
    entries = await filled(log)
    head = log.head_at(entries[4])
    forged = [*entries[:2]]
    for entry in (attrs.evolve(entries[2], success=True), *entries[3:]):
        draft = attrs.evolve(entry, prev_hash=forged[-1].record_hash)
        forged.append(attrs.evolve(draft, record_hash=record_hash(draft)))
    assert verify_audit_log(forged, tenant_id="acme").ok
    report = verify_audit_log(forged, tenant_id="acme", heads=[head])
    assert (report.ok, report.first_bad) == (False, 5)
    assert report.reason is not None
    assert "rewritten" in report.reason


async def test_truncation_is_found_by_a_kept_head(log: AuditLog) -> None:
    """A log that lost its tail verifies by itself, but not against a head that was kept."""
    entries = await filled(log)
    head = await log.head("acme")
    shorter = entries[:4]
    assert verify_audit_log(shorter, tenant_id="acme").ok
    report = verify_audit_log(shorter, tenant_id="acme", heads=[head])
    assert (report.ok, report.first_bad) == (False, 5)
    assert report.reason is not None
    assert "truncated: 6 entries were signed for, 4 are there" in report.reason


@pytest.mark.parametrize("gone", [0, 2, 4])
async def test_a_removed_entry_is_named(log: AuditLog, gone: int) -> None:
    """An entry taken out of the chain is named as missing, whether or not the rest was renumbered."""
    entries = await filled(log)
    rest = [*entries[:gone], *entries[gone + 1 :]]
    assert verify_audit_log(rest, tenant_id="acme").first_bad == gone + 1
    renumbered = []
    for number, entry in enumerate(rest, start=1):
        draft = attrs.evolve(entry, sequence=number)
        renumbered.append(attrs.evolve(draft, record_hash=record_hash(draft)))
    assert verify_audit_log(renumbered, tenant_id="acme").first_bad == gone + 1


async def test_order_matters(log: AuditLog) -> None:
    """Entries in any other order do not verify."""
    entries = await filled(log)
    shuffled = random.Random(3).sample(entries, len(entries))
    assert not verify_audit_log(shuffled, tenant_id="acme").ok


async def test_tenants_have_chains_of_their_own(log: AuditLog) -> None:
    """Interleaved tenants each verify by themselves, and neither log passes for the other's."""
    for number in range(9):
        await log.append(event(f"op-{number}", ("acme", "other", "third")[number % 3]))
    for tenant in ("acme", "other", "third"):
        entries = await log.entries(tenant)
        assert [entry.sequence for entry in entries] == [1, 2, 3]
        assert verify_audit_log(entries, tenant_id=tenant, heads=[await log.head(tenant)]).ok
    assert not verify_audit_log(await log.entries("acme"), tenant_id="other").ok


async def test_an_event_is_written_once(log: AuditLog) -> None:
    """A repeated event adds nothing and gives the entry that is there; acceptance and end are two events."""
    first = await log.append(event())
    assert await log.append(event(error_code="ANOTHER")) == first
    ended = await log.append(event(event="ended", success=False, error_code="X", error_message="no"))
    assert [entry.event for entry in await log.entries("acme")] == ["accepted", "ended"]
    assert (ended.success, ended.error_code, ended.error_message) == (False, "X", "no")


async def test_many_events_are_written_together(log: AuditLog) -> None:
    """A batch over several tenants, with repetitions inside and from before, gives one entry per event, in order."""
    first = await log.append(event("op-1"))
    batch = [event("op-2"), event("op-1"), event("op-1", "other"), event("op-2"), event("op-2", event="ended")]
    entries = await log.append_all(batch)
    assert [(entry.tenant_id, entry.sequence) for entry in entries] == [
        ("acme", 2),
        ("acme", 1),
        ("other", 1),
        ("acme", 2),
        ("acme", 3),
    ]
    assert entries[1] == first
    for tenant in ("acme", "other"):
        assert verify_audit_log(await log.entries(tenant), tenant_id=tenant, heads=[await log.head(tenant)]).ok
    assert await log.append_all([]) == []


async def test_concurrent_writers_keep_the_chain(tmp_path: Path) -> None:
    """Two servers that share a database, each with many writers, make one chain without gap or fork."""
    url = sqlite_url(tmp_path / "test.db")
    databases = await asyncio.gather(Database.open(url), Database.open(url))
    logs = [AuditLog(database, HeadSigner(tmp_path / "audit.key")) for database in databases]
    await asyncio.gather(*(logs[n % 2].append(event(f"op-{n // 2}")) for n in range(40)))
    entries = await logs[0].entries("acme")
    assert len(entries) == 20
    assert verify_audit_log(entries, tenant_id="acme", heads=[await logs[1].head("acme")]).ok
    for database in databases:
        await database.close()


async def test_entries_are_filtered_and_paged(log: AuditLog) -> None:
    """Filters by client, operation and time, limit and offset, in the order of the chain."""
    for number in range(6):
        changes = {"training_client_id": f"tc-{number % 2}", "operation": "sample" if number > 3 else "optim_step"}
        await log.append(event(f"op-{number}", **changes, timestamp=NOW + timedelta(minutes=number)))

    async def sequences(**filters: Any) -> list[int]:
        return [entry.sequence for entry in await log.entries("acme", **filters)]

    assert await sequences(training_client_id="tc-1") == [2, 4, 6]
    assert await sequences(operation="sample") == [5, 6]
    window = {"start_time": NOW + timedelta(minutes=1), "end_time": NOW + timedelta(minutes=3)}
    assert await sequences(**window) == [2, 3, 4]
    assert await sequences(limit=2, offset=3) == [4, 5]
    assert await log.entries("nobody") == []


async def test_an_empty_log_has_a_head(log: AuditLog) -> None:
    """The head of a tenant without entries says zero, and an empty log verifies against it."""
    head = await log.head("acme")
    assert (head.sequence, head.record_hash) == (0, genesis_hash("acme"))
    assert verify_audit_log([], tenant_id="acme", heads=[head]).ok


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 5},
        {"record_hash": "sha256:0"},
        {"timestamp": NOW},
        {"tenant_id": "other"},
        {"signature": "AAAA"},
        {"signature": "not base64!"},
        {"key_id": "audit-0"},
        {"public_key": "AAAA"},
    ],
)
async def test_a_changed_head_is_refused(log: AuditLog, change: dict[str, Any]) -> None:
    """A head with any field changed has no valid signature."""
    entries = await filled(log)
    head = attrs.evolve(await log.head("acme"), **change)
    report = verify_audit_log(entries, tenant_id="acme", heads=[head])
    assert not report.ok
    assert report.reason is not None
    assert "not signed by the expected key" in report.reason


async def test_a_head_of_another_key_is_refused(log: AuditLog, tmp_path: Path) -> None:
    """When the key is pinned, a head that somebody else signed counts for nothing."""
    entries = await filled(log)
    stranger = HeadSigner(tmp_path / "stranger.key")
    head = stranger.sign("acme", 6, entries[-1].record_hash)
    assert verify_audit_log(entries, tenant_id="acme", heads=[head]).ok
    pinned = (await log.head("acme")).public_key
    assert not verify_audit_log(entries, tenant_id="acme", heads=[head], public_key=pinned).ok


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"entries": None}, "entries"),
        ({"entries": "log"}, "entries[0]"),
        ({"entries": [], "tenant_id": 5}, "tenant_id"),
        ({"entries": [], "heads": [3]}, "heads[0]"),
    ],
)
def test_what_is_no_log_is_refused(arguments: dict[str, Any], field: str) -> None:
    """Whatever is no entry and no head is named: it is neither a sound log nor one that was tampered with."""
    with pytest.raises(InvalidRequestError) as caught:
        verify_audit_log(**{"tenant_id": "acme", **arguments})
    assert caught.value.field == field


async def test_the_signing_key_is_kept(tmp_path: Path) -> None:
    """A restarted server signs with the same key, from a private file."""
    first = HeadSigner(tmp_path / "audit.key").public_key
    assert HeadSigner(tmp_path / "audit.key").public_key == first
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600


async def test_a_change_in_the_database_is_found(tmp_path: Path) -> None:
    """Somebody who edits or deletes rows directly is found out by verification."""
    database = await Database.open(sqlite_url(tmp_path / "test.db"))
    log = AuditLog(database, HeadSigner(tmp_path / "audit.key"))
    await filled(log)
    head = await log.head("acme")
    async with database.writing() as connection:
        where = (audit.c.tenant_id == "acme") & (audit.c.sequence == 3)
        text = (await connection.execute(audit.select().where(where))).one().entry
        await connection.execute(update(audit).where(where).values(entry=text.replace("optim_step", "sample")))
    assert verify_audit_log(await log.entries("acme"), tenant_id="acme").first_bad == 3
    async with database.writing() as connection:
        await connection.execute(update(audit).where(where).values(entry=text))
        await connection.execute(delete(audit).where(audit.c.sequence > 4))
    assert verify_audit_log(await log.entries("acme"), tenant_id="acme", heads=[head]).first_bad == 5
    await database.close()


async def test_entries_and_heads_cross_the_wire(log: AuditLog) -> None:
    """What a client decodes from JSON still verifies, to the last bit of every number."""
    entries = await filled(log)
    head = await log.head("acme")
    received = [decode(AuditLogEntry, loads(dumps(entry))) for entry in entries]
    kept = decode(AuditHead, loads(dumps(head)))
    assert (received, kept) == (entries, head)
    assert verify_audit_log(received, tenant_id="acme", heads=[kept]).ok
