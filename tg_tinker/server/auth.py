"""Who is asking: API keys to tenants. Keys are compared as hashes in constant time and never logged.

Every route needs a key unless it is on the public list; what a tenant may see is decided by looking things up by
tenant. A key reads ``tg_<id>_<secret>``; the database keeps the id and a hash of the secret.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING

from tg_tinker.errors import AuthenticationError
from tg_tinker.server.settings import LOCAL_TENANT, Settings

if TYPE_CHECKING:
    from tg_tinker.store.database import Database
    from tg_tinker.store.rows import ApiKeyRow

#: the route whose URLs carry a signature of their own
SIGNED = "/v1/loops/files/{token}/{name}"
#: routes that answer without a key
PUBLIC = frozenset({"/healthz", "/readyz", "/v1/health", "/api/v1/health", SIGNED})

_SCHEMES = ("bearer", "api-key")
_KEY = re.compile(r"tg_(?P<id>[0-9a-f]{16})_(?P<secret>[A-Za-z0-9_-]{43})")
_REMEMBERED = 5.0  # seconds; a revoked key works no longer than this
_TOLD = 60.0  # seconds in which the use of one lapsed key goes on record once: a program left running asks for ever
_NO_HASH = hashlib.sha256(b"").hexdigest()


def new_key(tenant: str, *, name: str | None = None, expires_at: datetime | None = None) -> tuple[str, ApiKeyRow]:
    """Draw an API key: its text, to be shown once, and the row to store."""
    from tg_tinker.store.rows import ApiKeyRow

    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    row = ApiKeyRow(
        key_id=key_id,
        tenant_id=tenant,
        secret_hash=_hash(secret),
        name=name,
        created_at=datetime.now(UTC),
        expires_at=expires_at,
    )
    return f"tg_{key_id}_{secret}", row


class Keys:
    """The keys that open this server: those of its settings and those of its database."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._own = {_hash(key): tenant for key, tenant in settings.keys.items()}
        self._database = database
        self._rows: dict[str, tuple[float, ApiKeyRow | None]] = {}
        self._lapsed: dict[str, float] = {}  # key id -> when its use went on record last
        self._ever: tuple[float, bool] = (-_REMEMBERED, False)  # when asked, and whether there ever was a key

    async def usable(self) -> bool:
        """Whether anybody could come in with a key."""
        now = datetime.now(UTC)
        return bool(self._own) or any(row.usable(now) for row in await self._database.list_api_keys())

    async def required(self) -> bool:
        """Whether every request must show a key: once there was one, also when the last has expired or is revoked.

        A server that only its own machine can reach asks for none before that, unless it was told to.
        """
        if self._settings.require_key or not self._settings.loopback or self._own:
            return True
        asked, ever = self._ever
        if not ever and monotonic() > asked + _REMEMBERED:
            ever = bool(await self._database.list_api_keys())
            self._ever = monotonic(), ever
        return ever

    async def tenant_of(self, authorization: str | None) -> str:
        """The tenant behind an ``Authorization`` header.

        Raises ``AuthenticationError``, which never says what about the key was wrong.
        """
        key = _key_of(authorization)
        if key is None:
            if await self.required():
                raise AuthenticationError("give an API key: Authorization: Bearer <key>")
            return LOCAL_TENANT
        tenant = self._own_tenant(key)
        if tenant is not None:
            return tenant
        row = await self._stored(key)
        if row is None or not row.usable(datetime.now(UTC)):
            raise AuthenticationError("the API key is not known here, or no longer valid")
        return row.tenant_id

    async def lapsed(self, authorization: str | None) -> ApiKeyRow | None:
        """The key behind a refused header, if it was good once and its use is to go on record now."""
        key, now = _key_of(authorization), monotonic()
        row = None if key is None else await self._stored(key)
        if row is None or now < self._lapsed.get(row.key_id, -_TOLD) + _TOLD:
            return None
        self._lapsed[row.key_id] = now
        return row

    def _own_tenant(self, key: str) -> str | None:
        offered, found = _hash(key), None
        for known, tenant in self._own.items():
            if hmac.compare_digest(known, offered):
                found = tenant
        return found

    async def _stored(self, key: str) -> ApiKeyRow | None:
        """The row of a key of the database, usable or not."""
        parts = _KEY.fullmatch(key)
        row = None if parts is None else await self._row(parts["id"])
        offered = _hash(key if parts is None else parts["secret"])
        same = hmac.compare_digest(_NO_HASH if row is None else row.secret_hash, offered)
        return row if same else None

    async def _row(self, key_id: str) -> ApiKeyRow | None:
        asked, row = self._rows.get(key_id, (-_REMEMBERED, None))
        if monotonic() > asked + _REMEMBERED:
            row = await self._database.get_api_key(key_id)
            if len(self._rows) > 10_000:  # somebody is guessing
                self._rows.clear()
            self._rows[key_id] = monotonic(), row
        return row


def _key_of(authorization: str | None) -> str | None:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() in _SCHEMES and key.strip() else None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()  # a header may hold any bytes
