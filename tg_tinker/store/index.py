"""Where artifacts lie: a folder per tenant, two files per artifact. The manifests are the one index there is.

A manifest that ends in ``.json`` is listed. One that ends in ``.aside`` belongs to a version that its name has moved on
from: it is found by its id alone, for those who still sample from it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.store import files, sealing, tink_aead
from tg_tinker.store.names import folder_name, is_artifact_id
from tg_tinker.types import checks
from tg_tinker.types.results import EncryptionInfo

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from tg_tinker.store.sealing import Manifest

__all__ = ["ORPHAN_AGE", "ArtifactRecord", "Index", "record_of"]

_log = logging.getLogger("tg_tinker.store")

LISTED, ASIDE, CONTENT = ".json", ".aside", ".sealed"
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


class Index:
    """The manifests of every tenant, and the places of what they describe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files.make_folder(folder)
        self._sweep_orphans()

    def content(self, tenant: str, artifact_id: str) -> Path:
        """Where an artifact's ciphertext lies."""
        return self._of(tenant) / f"{artifact_id}{CONTENT}"

    def prepare(self, tenant: str) -> None:
        """Make a tenant's folder."""
        files.make_folder(self._of(tenant))

    def add(self, manifest: Manifest) -> None:
        """List an artifact whose ciphertext is in its place."""
        files.write(self._manifest(manifest.identity.tenant, manifest.identity.artifact_id), manifest.to_bytes())

    def replace(self, manifest: Manifest) -> None:
        """Write an artifact's manifest anew, listed or aside as it is; the tenant is ``locked``."""
        tenant, artifact_id = manifest.identity.tenant, manifest.identity.artifact_id
        listed, aside = self._manifest(tenant, artifact_id), self._manifest(tenant, artifact_id, ASIDE)
        files.write(aside if aside.exists() else listed, manifest.to_bytes())

    def holds(self, tenant: str, artifact_id: str) -> bool:
        """Whether an artifact has not been deleted, at the price of one look; its time to live is not looked at."""
        return any(self._manifest(tenant, artifact_id, suffix).exists() for suffix in (LISTED, ASIDE))

    def get(self, tenant: str, artifact_id: str) -> Manifest:
        """Look an artifact up, listed or aside.

        Raises ``ResourceNotFoundError``.
        """
        message = f"no such artifact: {checks.shown(artifact_id)}"
        missing = ResourceNotFoundError(message, resource_type="artifact", resource_id=str(artifact_id))
        if not is_artifact_id(artifact_id):
            raise missing
        try:
            manifest = sealing.Manifest.from_bytes(self._read(tenant, artifact_id))
        except FileNotFoundError:
            raise missing from None
        if record_of(manifest).expired(datetime.now(UTC)):
            raise missing
        return manifest

    def manifests(self, tenant: str, suffix: str = LISTED) -> Iterator[Manifest]:
        """Every manifest of a tenant that reads as it was written."""
        return _all_readable(self._of(tenant), suffix)

    def put_aside(self, tenant: str, artifact_id: str) -> None:
        """Take an artifact out of the listings; one that is gone stays gone."""
        with self.locked(tenant), contextlib.suppress(FileNotFoundError):
            self._manifest(tenant, artifact_id).replace(self._manifest(tenant, artifact_id, ASIDE))
            files.sync_folder(self._of(tenant))

    def runs_aside(self) -> set[tuple[str, str]]:
        """The tenants and runs of everything that is aside."""
        found = (manifest for folder in self._folders() for manifest in _all_readable(folder, ASIDE))
        return {(manifest.identity.tenant, str(manifest.header["run_id"])) for manifest in found}

    def sizes(self, tenant: str) -> tuple[int, int]:
        """Bytes of ciphertext that are listed, and that are aside."""
        listed, aside = 0, 0
        for path in self._of(tenant).glob(f"art-*{CONTENT}"):
            with contextlib.suppress(FileNotFoundError):  # deleted while we looked
                size = path.stat().st_size
                if path.with_suffix(ASIDE).exists():
                    aside += size
                else:
                    listed += size
        return listed, aside

    def remove(self, tenant: str, *artifact_ids: str) -> None:
        """Remove both files of each; the tenant is ``locked``."""
        _remove(self._of(tenant), *artifact_ids)

    def sweep(self, now: datetime) -> int:
        """Remove what has expired, whoever's it is, and count it."""
        count = 0
        for folder in self._folders():
            with files.locked(folder / ".lock"):
                for path in folder.glob(f"art-*{LISTED}"):
                    manifest = _readable(path)
                    if manifest is not None and record_of(manifest).expired(now):
                        _remove(folder, path.stem)
                        count += 1
        return count

    @contextlib.contextmanager
    def locked(self, tenant: str) -> Generator[None]:
        """Hold a tenant's folder against other threads and processes."""
        self.prepare(tenant)
        with files.locked(self._of(tenant) / ".lock"):
            yield

    def _of(self, tenant: str) -> Path:
        return self._folder / folder_name(tenant)

    def _manifest(self, tenant: str, artifact_id: str, suffix: str = LISTED) -> Path:
        return self._of(tenant) / f"{artifact_id}{suffix}"

    def _read(self, tenant: str, artifact_id: str) -> bytes:
        """Read a manifest; looked for in this order, for it may be put aside meanwhile."""
        try:
            return self._manifest(tenant, artifact_id).read_bytes()
        except FileNotFoundError:
            return self._manifest(tenant, artifact_id, ASIDE).read_bytes()

    def _folders(self) -> Sequence[Path]:
        return sorted(path for path in self._folder.iterdir() if path.is_dir())

    def _sweep_orphans(self) -> None:
        """Remove what a dead server left half written; what is young may be another server's save in progress."""
        oldest = time.time() - ORPHAN_AGE
        for path in (path for folder in self._folders() for path in folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # another server has just renamed or removed it
                if _is_unfinished(path) and path.stat().st_mtime < oldest:
                    path.unlink()


def record_of(manifest: Manifest) -> ArtifactRecord:
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


def _all_readable(folder: Path, suffix: str) -> Iterator[Manifest]:
    for path in sorted(folder.glob(f"art-*{suffix}")):
        manifest = _readable(path)
        if manifest is not None:
            yield manifest


def _readable(path: Path) -> Manifest | None:
    """Read a manifest of a listing, or leave it out: loading it is what reports the damage."""
    try:
        manifest = sealing.Manifest.from_bytes(path.read_bytes())
        record_of(manifest)
    except FileNotFoundError:
        return None  # deleted, or put aside, while we looked
    except InvalidRequestError:
        _log.warning("the manifest %s is damaged", path.name)
        return None
    return manifest


def _is_unfinished(path: Path) -> bool:
    """Whether a file is half of something; looked at in this order, for a manifest may be put aside meanwhile."""
    described = any(path.with_suffix(suffix).exists() for suffix in (LISTED, ASIDE))
    return path.suffix == files.TEMPORARY_SUFFIX or (path.suffix == CONTENT and not described)


def _remove(folder: Path, *artifact_ids: str) -> None:
    """Take the manifests away first: what is left after a crash is an orphan, and no artifact."""
    for artifact_id in artifact_ids:
        for suffix in (LISTED, ASIDE):
            (folder / f"{artifact_id}{suffix}").unlink(missing_ok=True)
    files.sync_folder(folder)
    for artifact_id in artifact_ids:
        (folder / f"{artifact_id}{CONTENT}").unlink(missing_ok=True)
