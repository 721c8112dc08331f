"""Sealed checkpoints on disk: a folder per tenant, two files per artifact, the manifest written last.

The manifests are the one index there is: names, steps, sizes, expiry.
Synchronous, and safe from several threads and processes.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.store import container, files, sealing, tink_aead
from tg_tinker.store.names import check_label, folder_name, is_artifact_id
from tg_tinker.types.results import EncryptionInfo
from tg_tinker.wire.digest import canonical_json

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from tg_tinker.store.keys import KeyProvider
    from tg_tinker.store.sealing import Manifest

_log = logging.getLogger("tg_tinker.store")

KINDS = ("tg_state", "weights", "sampler_weights")
MAX_METADATA_BYTES = 1 << 20
ORPHAN_AGE = 3600.0  # seconds: no save takes longer, so an older file without a manifest is a dead server's


@attrs.frozen(kw_only=True)
class ArtifactRecord:
    """What is known of an artifact without its key. Times are UTC; ``size_bytes`` counts ciphertext.

    ``privacy`` of a run under DP: the unit that is protected and what was spent.
    """

    artifact_id: str
    tenant: str
    run_id: str
    kind: str
    name: str | None
    step: int
    size_bytes: int
    encryption: EncryptionInfo
    metadata: dict[str, Any]
    privacy: dict[str, Any] | None
    created_at: datetime
    expires_at: datetime | None

    def expired(self, now: datetime) -> bool:
        """Tell whether the artifact's time to live has run out."""
        return self.expires_at is not None and self.expires_at <= now


@attrs.frozen
class Loaded:
    """A verified, decrypted artifact."""

    record: ArtifactRecord
    tensors: dict[str, Tensor]
    counters: dict[str, Any]


class CheckpointStore:
    """The artifacts of every tenant, sealed under keys of ``keys``."""

    def __init__(self, folder: Path, keys: KeyProvider) -> None:
        self._folder = folder
        self._keys = keys
        files.make_folder(folder)
        self._sweep_orphans()

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

        Raises ``InvalidRequestError`` naming the field that is wrong.
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
        return _record(self._write(identity, header, container.pack(tensors, counters)))

    def load(self, tenant: str, artifact_id: str) -> Loaded:
        """Verify and decrypt an artifact.

        Raises ``ResourceNotFoundError`` (ARTIFACT_NOT_FOUND, KEY_NOT_FOUND) or ``InvalidRequestError``
        (ARTIFACT_MISMATCH, ARTIFACT_DAMAGED).
        """
        manifest = self._manifest(tenant, artifact_id)
        path = self._ciphertext_path(tenant, artifact_id)
        try:
            with path.open("rb") as ciphertext:
                size = path.stat().st_size
                content = sealing.unseal(manifest, ciphertext, size, self._unwrap(tenant))
        except FileNotFoundError as error:
            raise sealing.damaged("its content is gone") from error
        if (manifest.identity.tenant, manifest.identity.artifact_id) != (tenant, artifact_id):
            raise sealing.mismatch(artifact_id)
        return Loaded(_record(manifest), *container.unpack(content))

    def get(self, tenant: str, artifact_id: str) -> ArtifactRecord:
        """Look an artifact up by its id.

        Raises ``ResourceNotFoundError``.
        """
        return _record(self._manifest(tenant, artifact_id))

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
        """Every artifact of a tenant, or of one run, oldest first. Damaged manifests are left out."""
        records = [_record(manifest) for manifest in self._manifests(tenant)]
        now = datetime.now(UTC)
        wanted = [r for r in records if run_id in (None, r.run_id) and not r.expired(now)]
        return sorted(wanted, key=lambda record: (record.created_at, record.artifact_id))

    def pull(self, tenant: str, artifact_id: str) -> bytes:
        """Give the sealed artifact as one string of bytes that opens anywhere with the tenant's key.

        Raises ``ResourceNotFoundError``.
        """
        manifest = self._manifest(tenant, artifact_id)
        try:
            return sealing.bundle(manifest, self._ciphertext_path(tenant, artifact_id).read_bytes())
        except FileNotFoundError as error:
            raise sealing.damaged("its content is gone") from error

    def delete(self, tenant: str, artifact_id: str) -> None:
        """Remove an artifact for good.

        Raises ``ResourceNotFoundError``.
        """
        self._manifest(tenant, artifact_id)
        with self._locked(tenant):
            _remove(self._tenant_folder(tenant), artifact_id)

    def rewrap(self, tenant: str) -> int:
        """Wrap every artifact's key under the tenant's current key and count those that needed it."""
        current, count = self._keys.current(tenant), 0
        with self._locked(tenant):
            for manifest in self._manifests(tenant):
                if manifest.wrapped.key_id != current:
                    renewed = sealing.rewrap(manifest, self._wrap(tenant), self._unwrap(tenant))
                    files.write(self._manifest_path(tenant, manifest.identity.artifact_id), renewed.to_bytes())
                    count += 1
        return count

    def sweep(self, now: datetime) -> int:
        """Remove artifacts whose time to live has run out, whoever's they are, and count them."""
        count = 0
        for folder in self._tenant_folders():
            with files.locked(folder / ".lock"):
                for path in folder.glob("art-*.json"):
                    manifest = _readable(path)
                    if manifest is not None and _record(manifest).expired(now):
                        _remove(folder, path.stem)
                        count += 1
        return count

    def _write(self, identity: sealing.Identity, header: dict[str, Any], content: bytes) -> Manifest:
        """Write the ciphertext, then the manifest: an artifact exists once its manifest does."""
        files.make_folder(self._tenant_folder(identity.tenant))
        with files.replacing(self._ciphertext_path(identity.tenant, identity.artifact_id)) as path:
            manifest = sealing.seal(content, identity, header, self._wrap(identity.tenant), path)
        files.write(self._manifest_path(identity.tenant, identity.artifact_id), manifest.to_bytes())
        return manifest

    def _manifest(self, tenant: str, artifact_id: str) -> Manifest:
        missing = ResourceNotFoundError("no such artifact", resource_type="artifact", resource_id=str(artifact_id))
        if not is_artifact_id(artifact_id):
            raise missing
        try:
            manifest = sealing.Manifest.from_bytes(self._manifest_path(tenant, artifact_id).read_bytes())
        except FileNotFoundError:
            raise missing from None
        if _record(manifest).expired(datetime.now(UTC)):
            raise missing
        return manifest

    def _manifests(self, tenant: str) -> Iterator[Manifest]:
        for path in sorted(self._tenant_folder(tenant).glob("art-*.json")):
            manifest = _readable(path)
            if manifest is not None:
                yield manifest

    def _wrap(self, tenant: str) -> sealing.Wrap:
        return lambda keyset, aad: self._keys.wrap(tenant, keyset, aad)

    def _unwrap(self, tenant: str) -> sealing.Unwrap:
        return lambda key_id, ciphertext, aad: self._keys.unwrap(tenant, key_id, ciphertext, aad)

    def _tenant_folder(self, tenant: str) -> Path:
        return self._folder / folder_name(tenant)

    def _manifest_path(self, tenant: str, artifact_id: str) -> Path:
        return self._tenant_folder(tenant) / f"{artifact_id}.json"

    def _ciphertext_path(self, tenant: str, artifact_id: str) -> Path:
        return self._tenant_folder(tenant) / f"{artifact_id}.sealed"

    def _tenant_folders(self) -> Sequence[Path]:
        return sorted(path for path in self._folder.iterdir() if path.is_dir())

    @contextlib.contextmanager
    def _locked(self, tenant: str) -> Generator[None]:
        files.make_folder(self._tenant_folder(tenant))
        with files.locked(self._tenant_folder(tenant) / ".lock"):
            yield

    def _sweep_orphans(self) -> None:
        """Remove what a dead server left half written; what is young may be another server's save in progress."""
        oldest = time.time() - ORPHAN_AGE
        for folder in self._tenant_folders():
            for path in folder.iterdir():
                unfinished = path.suffix == files.TEMPORARY_SUFFIX or (
                    path.suffix == ".sealed" and not path.with_suffix(".json").exists()
                )
                with contextlib.suppress(FileNotFoundError):  # another server has just renamed or removed it
                    if unfinished and path.stat().st_mtime < oldest:
                        path.unlink()


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


def _remove(folder: Path, artifact_id: str) -> None:
    """Take the manifest away first: what is left after a crash is an orphan, and no artifact."""
    (folder / f"{artifact_id}.json").unlink(missing_ok=True)
    files.sync_folder(folder)
    (folder / f"{artifact_id}.sealed").unlink(missing_ok=True)


def _readable(path: Path) -> Manifest | None:
    """Read a manifest of a listing, or leave it out: loading it is what reports the damage."""
    try:
        manifest = sealing.Manifest.from_bytes(path.read_bytes())
        _record(manifest)
    except FileNotFoundError:
        return None  # deleted while we looked
    except InvalidRequestError:
        _log.warning("the manifest %s is damaged", path.name)
        return None
    return manifest


def _record(manifest: Manifest) -> ArtifactRecord:
    """Read the header's fields.

    Raises ``InvalidRequestError`` with code ARTIFACT_DAMAGED.
    """
    header = manifest.header
    try:
        return ArtifactRecord(
            **attrs.asdict(manifest.identity),
            **{key: header[key] for key in ("run_id", "name", "step", "metadata", "privacy")},
            size_bytes=manifest.ciphertext_bytes,
            encryption=EncryptionInfo(
                algorithm=sealing.ALGORITHM, key_id=manifest.wrapped.key_id, format=tink_aead.STREAM_FORMAT
            ),
            created_at=datetime.fromisoformat(header["created_at"]),
            expires_at=None if header["expires_at"] is None else datetime.fromisoformat(header["expires_at"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise sealing.damaged("its manifest lacks fields") from error
