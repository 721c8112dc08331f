"""Sealed checkpoints on disk: saved, loaded, listed, deleted. Where their files lie is ``index``'s to know.

Synchronous, and safe from several threads and processes.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError, QuotaExceededError, ResourceNotFoundError
from tg_tinker.store import container, files, sealing
from tg_tinker.store.index import ASIDE, LISTED, ArtifactRecord, Index, record_of
from tg_tinker.store.names import check_label
from tg_tinker.wire.digest import canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from tg_tinker.store.keys import KeyProvider
    from tg_tinker.store.sealing import Manifest

__all__ = ["KINDS", "MAX_METADATA_BYTES", "ArtifactRecord", "CheckpointStore", "Loaded"]

_log = logging.getLogger("tg_tinker.store")

KINDS = ("tg_state", "weights", "sampler_weights")
MAX_METADATA_BYTES = 1 << 20


@attrs.frozen
class Loaded:
    """A verified, decrypted artifact."""

    record: ArtifactRecord
    tensors: dict[str, Tensor]
    counters: dict[str, Any]


class CheckpointStore:
    """The artifacts of every tenant, sealed under keys of ``keys``; at most ``quota`` bytes of ciphertext of each."""

    def __init__(self, folder: Path, keys: KeyProvider, *, quota: int | None = None) -> None:
        self._index = Index(folder)
        self._keys = keys
        self._quota = quota

    def save(
        self,
        *,
        tenant: str,
        run_id: str,
        kind: str,
        step: int,
        tensors: Mapping[str, Tensor | np.ndarray[Any, Any]],
        counters: Mapping[str, Any],
        metadata: Mapping[str, Any],
        name: str | None = None,
        expires_at: datetime | None = None,
        privacy: Mapping[str, Any] | None = None,
    ) -> ArtifactRecord:
        """Seal a state; it is durable when this returns. All but tensors and counters stays readable without the key.

        Raises ``InvalidRequestError`` naming the field that is wrong, ``QuotaExceededError`` where there is no room.
        """
        if kind not in KINDS:
            raise InvalidRequestError(f"kind: expected one of {KINDS}", field="kind", constraint=f"one of {KINDS}")
        _check_json(metadata)
        header = {
            "run_id": check_label(run_id, "run_id"),
            "name": None if name is None else check_label(name, "name"),
            "step": step,
            "metadata": dict(metadata),
            "privacy": None if privacy is None else dict(privacy),
            "created_at": datetime.now(UTC).isoformat(),
            "expires_at": None if expires_at is None else expires_at.astimezone(UTC).isoformat(),
        }
        identity = sealing.Identity(tenant, f"art-{secrets.token_hex(16)}", kind)
        return record_of(self._write(identity, header, container.pack(tensors, counters)))

    def load(self, tenant: str, artifact_id: str) -> Loaded:
        """Verify and decrypt an artifact.

        Raises ``ResourceNotFoundError`` (ARTIFACT_NOT_FOUND, KEY_NOT_FOUND) or ``InvalidRequestError``
        (ARTIFACT_MISMATCH, ARTIFACT_DAMAGED).
        """
        manifest = self._index.get(tenant, artifact_id)
        path = self._index.content(tenant, artifact_id)
        try:
            with path.open("rb") as ciphertext:
                size = path.stat().st_size
                content = sealing.unseal(manifest, ciphertext, size, self._unwrap(tenant))
        except FileNotFoundError as error:
            raise self._lost(tenant, artifact_id) from error
        if not manifest.identity.names(tenant, artifact_id):
            raise sealing.mismatch(artifact_id)
        return Loaded(record_of(manifest), *container.unpack(content))

    def get(self, tenant: str, artifact_id: str) -> ArtifactRecord:
        """Look an artifact up by its id.

        Raises ``ResourceNotFoundError``.
        """
        return record_of(self._index.get(tenant, artifact_id))

    def holds(self, tenant: str, artifact_id: str) -> bool:
        """Tell, at the price of one look at the disk, whether an artifact has not been deleted."""
        return self._index.holds(tenant, artifact_id)

    def find(self, tenant: str, run_id: str, kind: str, name: str) -> ArtifactRecord:
        """Look a checkpoint up by name; saving under a name again makes the newer one answer to it.

        Raises ``ResourceNotFoundError``.
        """
        for record in reversed(self.list(tenant, run_id)):
            if (record.kind, record.name) == (kind, name):
                return record
        message = f"run {run_id} has no {kind} checkpoint of this name"
        raise ResourceNotFoundError(message, resource_type="checkpoint", resource_id=name)

    def list(self, tenant: str, run_id: str | None = None) -> Sequence[ArtifactRecord]:
        """Every artifact of a tenant, or of one run, oldest first, without damaged ones and those put aside."""
        records = [record_of(manifest) for manifest in self._index.manifests(tenant)]
        now = datetime.now(UTC)
        wanted = [r for r in records if run_id in (None, r.run_id) and not r.expired(now)]
        return sorted(wanted, key=lambda record: (record.created_at, record.artifact_id))

    def pull(self, tenant: str, artifact_id: str) -> bytes:
        """Give the sealed artifact as one string of bytes that opens anywhere with the tenant's key.

        Raises ``ResourceNotFoundError``, or ``InvalidRequestError`` where its files are gone or another artifact's.
        """
        manifest = self._index.get(tenant, artifact_id)
        if not manifest.identity.names(tenant, artifact_id):
            sealing.unwrap_keyset(manifest, self._unwrap(tenant))
            raise sealing.mismatch(artifact_id)
        try:
            return sealing.bundle(manifest, self._index.content(tenant, artifact_id).read_bytes())
        except FileNotFoundError as error:
            raise self._lost(tenant, artifact_id) from error

    def _lost(self, tenant: str, artifact_id: str) -> InvalidRequestError:
        """Say that a ciphertext is gone; raises ``ResourceNotFoundError`` where its artifact was deleted meanwhile."""
        self._index.get(tenant, artifact_id)
        return sealing.damaged("its content is gone")

    def delete(self, tenant: str, artifact_id: str) -> None:
        """Remove an artifact for good, also one that is damaged.

        Raises ``ResourceNotFoundError``.
        """
        with contextlib.suppress(InvalidRequestError):
            self._index.get(tenant, artifact_id)
        with self._index.locked(tenant):
            self._index.remove(tenant, artifact_id)

    def put_aside(self, tenant: str, artifact_id: str) -> None:
        """Take an artifact out of every listing; by its id it goes on being there."""
        self._index.put_aside(tenant, artifact_id)

    def runs_aside(self) -> set[tuple[str, str]]:
        """The tenants and runs of everything that was put aside."""
        return self._index.runs_aside()

    def clear_aside(self, tenant: str, *run_ids: str) -> int:
        """Remove everything that was put aside of these runs, and count it."""
        aside = map(record_of, self._index.manifests(tenant, ASIDE))
        gone = [record.artifact_id for record in aside if record.run_id in run_ids]
        if gone:
            with self._index.locked(tenant):
                self._index.remove(tenant, *gone)
        return len(gone)

    def rewrap(self, tenant: str) -> int:
        """Wrap every artifact's key under the tenant's current key and count those that needed it.

        What does not open stays as it is, and is logged: it must not keep the others under an old key.
        """
        current, count = self._keys.current(tenant), 0
        with self._index.locked(tenant):
            for manifest in (m for suffix in (LISTED, ASIDE) for m in self._index.manifests(tenant, suffix)):
                if manifest.wrapped.key_id != current:
                    count += self._rewrapped(tenant, manifest)
        return count

    def _rewrapped(self, tenant: str, manifest: Manifest) -> bool:
        try:
            renewed = sealing.rewrap(manifest, self._wrap(tenant), self._unwrap(tenant))
        except (InvalidRequestError, ResourceNotFoundError) as error:
            _log.warning("artifact %s does not open, and stays as it is: %s", manifest.identity.artifact_id, error)
            return False
        self._index.replace(renewed)
        return True

    def sweep(self, now: datetime) -> int:
        """Remove artifacts whose time to live has run out, whoever's they are, and count them."""
        return self._index.sweep(now)

    def _write(self, identity: sealing.Identity, header: dict[str, Any], content: bytes) -> Manifest:
        """Write the ciphertext, then the manifest: an artifact exists once its manifest does."""
        self._index.prepare(identity.tenant)
        with files.replacing(self._index.content(identity.tenant, identity.artifact_id)) as path:
            manifest = sealing.seal(content, identity, header, self._wrap(identity.tenant), path)
            self._make_room(identity.tenant, manifest.ciphertext_bytes)
        self._index.add(manifest)
        return manifest

    def _make_room(self, tenant: str, size: int) -> None:
        """Refuse what the quota has no room for; what was put aside gives way, the oldest first.

        Saves that run side by side may together go over it, by what they hold.
        """
        if self._quota is None:
            return
        listed, aside = self._index.sizes(tenant)
        if listed + size > self._quota:
            raise _too_much(listed, size, self._quota)
        excess = listed + aside + size - self._quota
        for record in sorted(map(record_of, self._index.manifests(tenant, ASIDE)), key=lambda one: one.created_at):
            if excess <= 0:
                return
            with self._index.locked(tenant):
                self._index.remove(tenant, record.artifact_id)
            excess -= record.size_bytes

    def _wrap(self, tenant: str) -> sealing.Wrap:
        return lambda keyset, aad: self._keys.wrap(tenant, keyset, aad)

    def _unwrap(self, tenant: str) -> sealing.Unwrap:
        return lambda key_id, ciphertext, aad: self._keys.unwrap(tenant, key_id, ciphertext, aad)


def _too_much(used: int, needed: int, allowed: int) -> QuotaExceededError:
    message = (
        f"{used:,} of {allowed:,} bytes are taken by saved checkpoints, and {needed:,} more are needed: delete "
        "artifacts that are not needed any more, and give others a ttl_seconds"
    )
    return QuotaExceededError(message, used_bytes=used, needed_bytes=needed, allowed_bytes=allowed)


def _check_json(metadata: Mapping[str, Any]) -> None:
    try:
        size = len(canonical_json(dict(metadata)))
    except (TypeError, ValueError, RecursionError) as error:
        constraint = "a dict of JSON values, without NaN or infinity"
        raise InvalidRequestError(
            f"metadata: expected {constraint}", field="metadata", constraint=constraint
        ) from error
    if size > MAX_METADATA_BYTES:
        constraint = f"at most {MAX_METADATA_BYTES} bytes of JSON"
        raise InvalidRequestError(f"metadata: expected {constraint}", field="metadata", constraint=constraint)
