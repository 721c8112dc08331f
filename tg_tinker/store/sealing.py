"""Sealing: a manifest anybody may read, and a ciphertext only the key holder can open.

A fresh Tink keyset per artifact, wrapped by the tenant's key and bound to (tenant, artifact id, kind); the stream is
bound to every field of the header. What fails to open fails in one of three ways, each with its code: KEY_NOT_FOUND,
ARTIFACT_MISMATCH (authentic, but another artifact), ARTIFACT_DAMAGED. Not for where artifacts lie (``checkpoints``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.store import tink_aead
from tg_tinker.store.keyring import Wrapped
from tg_tinker.wire.digest import canonical_json, sha256_hex

FORMAT = "tg-artifact/1"
ALGORITHM = "AES-256-GCM"
MAGIC = b"tg-artifact/1\n"
MAX_MANIFEST_BYTES = 16 << 20

Wrap = Callable[[bytes, bytes], Wrapped]
Unwrap = Callable[[str, bytes, bytes], bytes]


@attrs.frozen
class Identity:
    """What an artifact is, and so what its key is bound to."""

    tenant: str
    artifact_id: str
    kind: str

    def names(self, tenant: str, artifact_id: str) -> bool:
        """Tell whether this is the artifact that was asked for."""
        return (self.tenant, self.artifact_id) == (tenant, artifact_id)

    def associated_data(self) -> bytes:
        """Encode what the wrapping of the artifact's keyset is bound to."""
        fields = {"artifact_id": self.artifact_id, "kind": self.kind, "tenant": self.tenant}
        return canonical_json({"format": FORMAT, **fields})


@attrs.frozen
class Manifest:
    """The readable half: the stream authenticates ``header``, which never changes; rotation changes the wrapping."""

    identity: Identity
    header: dict[str, Any]
    wrapped: Wrapped
    ciphertext_bytes: int

    def to_bytes(self) -> bytes:
        """Serialize with a checksum, which tells damage from a key that belongs elsewhere."""
        return canonical_json({**self.fields(), "checksum": sha256_hex(canonical_json(self.fields()))})

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Read and check a manifest.

        Raises ``InvalidRequestError`` with code ARTIFACT_DAMAGED.
        """
        try:
            fields = json.loads(content)
            header, encryption = fields["header"], fields["encryption"]
            identity = Identity(*(str(fields[name]) for name in ("tenant", "artifact_id", "kind")))
            wrapped = Wrapped(str(encryption["key_id"]), base64.b64decode(encryption["wrapped_key"], validate=True))
            manifest = cls(identity, dict(header), wrapped, int(fields["ciphertext_bytes"]))
            if manifest.to_bytes() != content:
                raise ValueError("checksum")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged("its manifest does not read as it was written") from error
        return manifest

    def stream_data(self) -> bytes:
        """Encode what the ciphertext is bound to: everything but the wrapping, which rotation replaces."""
        return canonical_json({"format": FORMAT, "header": self.header, **attrs.asdict(self.identity)})

    def fields(self) -> dict[str, Any]:
        """Give the whole manifest as plain JSON data."""
        encryption = {
            "algorithm": ALGORITHM,
            "format": tink_aead.STREAM_FORMAT,
            "key_id": self.wrapped.key_id,
            "wrapped_key": base64.b64encode(self.wrapped.ciphertext).decode(),
        }
        return {
            "format": FORMAT,
            **attrs.asdict(self.identity),
            "header": self.header,
            "encryption": encryption,
            "ciphertext_bytes": self.ciphertext_bytes,
        }


def seal(plaintext: bytes, identity: Identity, header: dict[str, Any], wrap: Wrap, destination: Path) -> Manifest:
    """Encrypt ``plaintext`` into the file ``destination`` and give back the manifest that opens it."""
    keyset = tink_aead.new_stream_keyset()
    draft = Manifest(identity, header, wrap(keyset, identity.associated_data()), 0)
    size = tink_aead.encrypt_stream(keyset, plaintext, destination, draft.stream_data())
    return attrs.evolve(draft, ciphertext_bytes=size)


def unseal(manifest: Manifest, ciphertext: BinaryIO, size: int, unwrap: Unwrap) -> bytes:
    """Verify and decrypt a whole artifact; ``size`` is how many bytes of ciphertext there are.

    Raises ``ResourceNotFoundError`` (KEY_NOT_FOUND) or ``InvalidRequestError`` (ARTIFACT_MISMATCH, ARTIFACT_DAMAGED).
    """
    if size != manifest.ciphertext_bytes:
        raise damaged(f"{manifest.ciphertext_bytes} bytes were sealed and {size} are there")
    keyset = unwrap_keyset(manifest, unwrap)
    try:
        return tink_aead.decrypt_stream(keyset, ciphertext, manifest.stream_data())
    except tink_aead.UnauthenticError as error:
        raise damaged("its content is not what was sealed") from error


def unwrap_keyset(manifest: Manifest, unwrap: Unwrap) -> bytes:
    """Decrypt the artifact's keyset, bound as it is to the manifest's identity."""
    try:
        return unwrap(manifest.wrapped.key_id, manifest.wrapped.ciphertext, manifest.identity.associated_data())
    except tink_aead.UnauthenticError as error:
        raise mismatch(manifest.identity.artifact_id) from error


def rewrap(manifest: Manifest, wrap: Wrap, unwrap: Unwrap) -> Manifest:
    """Wrap the same keyset under the current key; the ciphertext stays as it is."""
    keyset = unwrap_keyset(manifest, unwrap)
    return attrs.evolve(manifest, wrapped=wrap(keyset, manifest.identity.associated_data()))


def bundle(manifest: Manifest, ciphertext: bytes) -> bytes:
    """Join both halves into one self-describing string: magic line, manifest length (8 bytes, little-endian), both."""
    head = manifest.to_bytes()
    return b"".join((MAGIC, len(head).to_bytes(8, "little"), head, ciphertext))


def unbundle(data: bytes) -> tuple[Manifest, memoryview]:
    """Split a pulled artifact.

    Raises ``InvalidRequestError`` with code ARTIFACT_DAMAGED.
    """
    start = len(MAGIC) + 8
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    if data[: len(MAGIC)] != MAGIC or not 0 < length <= min(MAX_MANIFEST_BYTES, len(data) - start):
        raise damaged("these bytes are no pulled artifact, or the first of them are lost")
    return Manifest.from_bytes(data[start : start + length]), memoryview(data)[start + length :]


def damaged(why: str) -> InvalidRequestError:
    """Say that an artifact's bytes have changed since it was sealed."""
    return InvalidRequestError(f"the artifact is damaged: {why}", field="artifact", code="ARTIFACT_DAMAGED")


def mismatch(artifact_id: str) -> InvalidRequestError:
    """Say that what lies here was sealed as another artifact."""
    message = f"what is given as artifact {artifact_id} was sealed as another artifact, kind or tenant"
    return InvalidRequestError(message, field="artifact", code="ARTIFACT_MISMATCH")
