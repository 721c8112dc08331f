"""A tenant's key-encryption keys as one value: what a key file holds and what ``artifacts export-key`` gives the owner.

A key's id is a fingerprint of the key, so a wrong key can never pass for the right one. Not for where keys are kept
(``keys``).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets

import attrs

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.store import tink_aead
from tg_tinker.wire.digest import canonical_json

FORMAT = "tg-keys/1"


@attrs.frozen
class Wrapped:
    """Bytes encrypted under the key-encryption key ``key_id``."""

    key_id: str
    ciphertext: bytes


def key_id_of(key: bytes) -> str:
    """Name a key by its fingerprint."""
    return "kek-" + hashlib.sha256(b"tg-tinker key id\x00" + key).hexdigest()[:24]


@attrs.frozen
class KeyRing:
    """Every key-encryption key a tenant ever had, oldest first; the last one wraps, all of them unwrap."""

    tenant: str
    keys: dict[str, bytes] = attrs.field(repr=lambda keys: repr(list(keys)))

    @classmethod
    def of(cls, tenant: str, *keys: bytes) -> KeyRing:
        """Make a ring from raw 32-byte keys, oldest first."""
        return cls(tenant, {key_id_of(key): key for key in keys})

    @classmethod
    def from_bytes(cls, content: bytes) -> KeyRing:
        """Read a key file.

        Raises ``InvalidRequestError`` with ``field="key"``.
        """
        try:
            fields = json.loads(content)
            if fields["format"] != FORMAT:
                raise ValueError(FORMAT)
            keys = [base64.b64decode(key, validate=True) for key in fields["keys"]]
            tenant = str(fields["tenant"])
        except (ValueError, KeyError, TypeError, binascii.Error, RecursionError) as error:
            raise _bad_key_file() from error
        if not keys or any(len(key) != tink_aead.KEY_BYTES for key in keys):
            raise _bad_key_file()
        return cls.of(tenant, *keys)

    def to_bytes(self) -> bytes:
        """Serialize with the keys in the clear: for a private file, or for the owner."""
        keys = [base64.b64encode(key).decode() for key in self.keys.values()]
        return canonical_json({"format": FORMAT, "tenant": self.tenant, "keys": keys})

    @property
    def current(self) -> str:
        """Id of the key that new artifacts are wrapped with."""
        return next(reversed(self.keys))

    def with_new_key(self) -> KeyRing:
        """Add a fresh key and make it current."""
        return KeyRing.of(self.tenant, *self.keys.values(), secrets.token_bytes(tink_aead.KEY_BYTES))

    def wrap(self, plaintext: bytes, associated_data: bytes) -> Wrapped:
        """Encrypt under the current key."""
        return Wrapped(self.current, tink_aead.wrap(self.keys[self.current], plaintext, associated_data))

    def unwrap(self, key_id: str, ciphertext: bytes, associated_data: bytes) -> bytes:
        """Decrypt under the key that was current then.

        Raises ``ResourceNotFoundError`` (code KEY_NOT_FOUND) or ``tink_aead.UnauthenticError``.
        """
        if key_id not in self.keys:
            raise unknown_key(key_id)
        return tink_aead.unwrap(self.keys[key_id], ciphertext, associated_data)


def unknown_key(key_id: str) -> ResourceNotFoundError:
    """Say that a key is not held here."""
    message = (
        f"the key {key_id} that seals this artifact is not among the keys given: it is another owner's, was erased, "
        "or was made after they were exported"
    )
    return ResourceNotFoundError(message, resource_type="key", resource_id=key_id)


def _bad_key_file() -> InvalidRequestError:
    constraint = f"a key file of format {FORMAT}, as `tg-tinker artifacts export-key` writes it"
    return InvalidRequestError(f"key: expected {constraint}", field="key", constraint=constraint)
