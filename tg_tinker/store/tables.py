"""The tables, as SQLAlchemy Core. Portable SQL only, so that another database can take SQLite's place.

There is no table of artifacts: their manifests are the one index (``checkpoints``).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

if TYPE_CHECKING:
    from sqlalchemy import Dialect

metadata = MetaData()


class UtcTime(TypeDecorator[datetime]):
    """An aware datetime, always UTC: SQLite would drop the zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store as naive UTC."""
        del dialect
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Read back as aware UTC."""
        del dialect
        return None if value is None else value.replace(tzinfo=UTC)


tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", String(128), primary_key=True),
    Column("created_at", UtcTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False, index=True),
    Column("secret_hash", String(128), nullable=False),
    Column("name", String(128)),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(128), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("surface", String(16), nullable=False),
    Column("model_ref", Text, nullable=False),
    Column("status", String(32), nullable=False),
    Column("step", Integer, nullable=False),
    Column("config", JSON, nullable=False),
    Column("state", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    Index("runs_of_tenant", "tenant_id", "created_at"),
)

futures = Table(
    "futures",
    metadata,
    Column("future_id", String(128), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("run_id", String(128)),
    Column("operation", String(64), nullable=False),
    Column("status", String(32), nullable=False),
    Column("idempotency_key", String(128)),
    Column("owner", String(128), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("completed_at", UtcTime),
    Column("expires_at", UtcTime),
    Column("result", LargeBinary),
    Column("error", JSON),
    UniqueConstraint("tenant_id", "idempotency_key"),
    Index("futures_of_tenant", "tenant_id", "run_id", "created_at"),
    Index("futures_by_status", "status", "owner"),
    Index("futures_by_expiry", "expires_at"),
)

audit = Table(
    "audit",
    metadata,
    Column("tenant_id", String(128), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("operation_id", String(128), nullable=False),
    Column("event", String(16), nullable=False),
    Column("training_client_id", String(128)),
    Column("operation", String(64), nullable=False),
    Column("timestamp", UtcTime, nullable=False),
    Column("record_hash", String(80), nullable=False),
    Column("entry", Text, nullable=False),
    UniqueConstraint("tenant_id", "operation_id", "event"),
    Index("audit_by_run", "tenant_id", "training_client_id", "sequence"),
)
