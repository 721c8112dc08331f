"""Rows of the database as values."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import attrs

FINISHED = ("completed", "failed", "cancelled")


@attrs.frozen(kw_only=True)
class ApiKeyRow:
    """An API key at rest: its id and the hash of its secret, never the secret."""

    key_id: str
    tenant_id: str
    secret_hash: str = attrs.field(repr=False)
    name: str | None
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    def usable(self, now: datetime) -> bool:
        """Tell whether the key is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@attrs.frozen(kw_only=True)
class RunRow:
    """A run as it is listed. ``state`` is whatever the server needs to find the run again (JSON)."""

    run_id: str
    tenant_id: str
    surface: str
    model_ref: str
    status: str
    step: int
    config: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    state: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class FutureRow:
    """An accepted operation and, once it has ended, its outcome.

    ``result`` is the encoded result as it goes over the wire; ``error`` a wire error body; ``owner`` names the server
    process that held it; ``expires_at`` says until when a finished result is kept.
    """

    future_id: str
    tenant_id: str
    run_id: str | None
    operation: str
    status: str
    owner: str
    created_at: datetime
    idempotency_key: str | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    expires_at: datetime | None = None
    result: bytes | None = attrs.field(default=None, repr=False)
    error: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Tell whether the outcome is known."""
        return self.status in FINISHED
