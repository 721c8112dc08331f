"""Where tenants' key-encryption keys come from: a private file each, or the environment.

A key is made once and kept; nothing here ever falls back to a throw-away key. Not for using keys (``sealing``).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import secrets
import stat
from typing import TYPE_CHECKING, Protocol

from tg_tinker.errors import InvalidRequestError
from tg_tinker.store import files, tink_aead
from tg_tinker.store.keyring import KeyRing, Wrapped, unknown_key
from tg_tinker.store.names import check_label, folder_name

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

VARIABLE = "TG_TINKER_MASTER_KEYS"


class KeyProvider(Protocol):
    """Wraps and unwraps the per-artifact keysets of each tenant; KMS clients fit behind it."""

    def current(self, tenant: str) -> str:
        """Id of the tenant's current key, which is made if there is none."""
        ...

    def wrap(self, tenant: str, keyset: bytes, aad: bytes) -> Wrapped:
        """Encrypt a keyset under the current key, bound to ``aad``."""
        ...

    def unwrap(self, tenant: str, key_id: str, ciphertext: bytes, aad: bytes) -> bytes:
        """Decrypt a keyset under whichever key wrapped it.

        Raises ``ResourceNotFoundError`` (KEY_NOT_FOUND) or ``tink_aead.UnauthenticError``.
        """
        ...

    def rotate(self, tenant: str) -> str:
        """Add a key, make it current and give back its id; every older key keeps unwrapping."""
        ...

    def erase(self, tenant: str) -> None:
        """Destroy every key of the tenant: all of the tenant's artifacts become unreadable, for ever."""
        ...

    def export(self, tenant: str) -> bytes:
        """Give the owner the tenant's keys, to open artifacts elsewhere."""
        ...

    def holds(self, tenant: str) -> bool:
        """Tell whether the tenant has a key; asking makes none."""
        ...


def provider_of(home: Path, environment: Mapping[str, str] = os.environ) -> KeyProvider:
    """Choose where a home's keys come from: ``TG_TINKER_MASTER_KEYS`` where it is set, else the files in its ``keys``.

    Neither stands in for the other: what the files' keys sealed opens again when the variable is unset.
    """
    return KeyEnvironment(environment=environment) if VARIABLE in environment else KeyFile(home / "keys")


class KeyFile:
    """One private file (0600) per tenant, holding every key id ever; several servers may share the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files.make_folder(folder)

    def current(self, tenant: str) -> str:
        """Id of the tenant's current key, which is made if there is none."""
        return self._ring(tenant).current

    def wrap(self, tenant: str, keyset: bytes, aad: bytes) -> Wrapped:
        """Encrypt a keyset under the current key, bound to ``aad``."""
        return self._ring(tenant).wrap(keyset, aad)

    def unwrap(self, tenant: str, key_id: str, ciphertext: bytes, aad: bytes) -> bytes:
        """Decrypt a keyset under whichever key wrapped it; no key is made for that."""
        if not self.holds(tenant):
            raise unknown_key(key_id)
        return self._read(tenant).unwrap(key_id, ciphertext, aad)

    def rotate(self, tenant: str) -> str:
        """Add a key and make it current; the file keeps all older ones."""
        with self._locked():
            self._make(tenant)
            ring = self._read(tenant).with_new_key()
            files.write(self._path(tenant), ring.to_bytes())
        return ring.current

    def erase(self, tenant: str) -> None:
        """Destroy the tenant's key file: all of the tenant's artifacts become unreadable, for ever."""
        with self._locked():
            self._path(tenant).unlink(missing_ok=True)
            files.sync_folder(self._folder)

    def export(self, tenant: str) -> bytes:
        """Give the owner the tenant's keys, in the clear."""
        return self._ring(tenant).to_bytes()

    def holds(self, tenant: str) -> bool:
        """Tell whether the tenant has a key file; asking makes none."""
        return self._path(tenant).exists()

    def _path(self, tenant: str) -> Path:
        return self._folder / f"{folder_name(tenant)}.json"

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """Hold the folder; what another process left half written there holds keys, and is removed."""
        with files.locked(self._folder / ".lock"):
            for path in self._folder.glob(f".*{files.TEMPORARY_SUFFIX}"):
                path.unlink()
            yield

    def _ring(self, tenant: str) -> KeyRing:
        if not self.holds(tenant):
            with self._locked():
                self._make(tenant)
        return self._read(tenant)

    def _make(self, tenant: str) -> None:
        """Make a key where there is none; the folder is ``_locked``."""
        files.create(self._path(tenant), KeyRing.of(tenant, secrets.token_bytes(tink_aead.KEY_BYTES)).to_bytes())

    def _read(self, tenant: str) -> KeyRing:
        path = self._path(tenant)
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InvalidRequestError(f"the key file {path.name} is open to others; chmod 600 it", field="key")
        ring = KeyRing.from_bytes(path.read_bytes())
        if ring.tenant != tenant:
            raise InvalidRequestError(f"the key file {path.name} belongs to another tenant", field="key")
        return ring


class KeyEnvironment:
    """Master keys in an environment variable, newest first and comma-separated, each 32 bytes in base64.

    A tenant's keys are derived from them (HKDF-SHA256, RFC 5869). Rotating means putting a new key in front.
    """

    def __init__(self, variable: str = VARIABLE, environment: Mapping[str, str] = os.environ) -> None:
        self._variable = variable
        self._masters = [self._decode(part) for part in environment.get(variable, "").split(",")]

    def current(self, tenant: str) -> str:
        """Id of the tenant's key under the first master key."""
        return self._ring(tenant).current

    def wrap(self, tenant: str, keyset: bytes, aad: bytes) -> Wrapped:
        """Encrypt a keyset under the current key, bound to ``aad``."""
        return self._ring(tenant).wrap(keyset, aad)

    def unwrap(self, tenant: str, key_id: str, ciphertext: bytes, aad: bytes) -> bytes:
        """Decrypt a keyset under whichever key wrapped it."""
        return self._ring(tenant).unwrap(key_id, ciphertext, aad)

    def rotate(self, tenant: str) -> str:
        """Refuse: the environment is the operator's to change."""
        raise InvalidRequestError(
            f"keys from the environment are rotated there: put a new key in front of {self._variable}, "
            f"restart, and re-wrap (tenant {tenant})"
        )

    def erase(self, tenant: str) -> None:
        """Refuse: derived keys exist as long as the master key does."""
        raise InvalidRequestError(f"keys derived from {self._variable} cannot be erased for one tenant ({tenant})")

    def export(self, tenant: str) -> bytes:
        """Give the owner the tenant's keys, in the clear; the master keys stay here."""
        return self._ring(tenant).to_bytes()

    def holds(self, tenant: str) -> bool:
        """Say yes: every tenant's key follows from the master keys."""
        return bool(self._ring(tenant).keys)

    def _decode(self, text: str) -> bytes:
        try:
            key = base64.b64decode(text.strip(), validate=True)
        except binascii.Error:
            key = b""
        if len(key) != tink_aead.KEY_BYTES:
            constraint = "comma-separated base64 of 32 random bytes each, newest first"
            raise InvalidRequestError(f"{self._variable}: expected {constraint}", field=self._variable)
        return key

    def _ring(self, tenant: str) -> KeyRing:
        return KeyRing.of(tenant, *(_derive(master, tenant) for master in reversed(self._masters)))


def _derive(master: bytes, tenant: str) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"tg-tinker kek v1\x00" + check_label(tenant, "tenant").encode()
    return HKDF(algorithm=SHA256(), length=tink_aead.KEY_BYTES, salt=None, info=info).derive(master)
