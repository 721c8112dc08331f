"""The record of every noisy release of a run: append-only, durable before the noise is drawn, never rolled back.

It travels with checkpoints; loading one unites both records. A file per lineage, one JSON line per release.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.privacy.accountant import Mechanism

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


@attrs.frozen(kw_only=True)
class Release:
    """One optimizer step's release; ``noise_multiplier`` 0 means that it had no noise."""

    release_id: str
    lineage: str
    step: int
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float

    @property
    def mechanism(self) -> Mechanism:
        """What the accountant needs to know of it."""
        return Mechanism(self.noise_multiplier, self.sample_rate)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Release:
        """Read a release back from a checkpoint or a ledger file.

        Raises ``InvalidRequestError``.
        """
        try:
            release = cls(
                release_id=str(fields["release_id"]),
                lineage=str(fields["lineage"]),
                step=int(fields["step"]),
                noise_multiplier=float(fields["noise_multiplier"]),
                max_grad_norm=float(fields["max_grad_norm"]),
                sample_rate=float(fields["sample_rate"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                "the privacy ledger holds an entry that cannot be read", field="ledger"
            ) from error
        if not (release.noise_multiplier >= 0.0 and 0.0 < release.sample_rate <= 1.0):
            raise InvalidRequestError("the privacy ledger holds an impossible entry", field="ledger")
        return release


class Ledger:
    """The releases of one lineage, in order, each once. One writer at a time: the server that owns the run."""

    def __init__(self, folder: Path, lineage: str) -> None:
        self.lineage = lineage
        self._path = _path_of(folder, lineage)
        self._releases: dict[str, Release] = {}
        self._unwritten: dict[str, Release] = {}
        self._good_bytes = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._read()

    def __len__(self) -> int:
        """Count the releases."""
        return len(self._releases)

    def append(self, release: Release) -> None:
        """Add a release; it is durable when this returns. One that is there already (a replay) is not added again."""
        self.unite([release])

    def unite(self, releases: Iterable[Release]) -> None:
        """Add every release that is missing here, durably."""
        for release in releases:
            if release.release_id not in self._releases:
                # Counted at once: should writing fail, the error must not make it free.
                self._releases[release.release_id] = self._unwritten[release.release_id] = release
        if self._unwritten:
            self._write()

    def others(self, lineages: Iterable[str]) -> list[Release]:
        """Give what other lineages have released by now, as far as their ledgers lie beside this one.

        Raises ``ServerError`` where one is damaged.
        """
        paths = {lineage: _path_of(self._path.parent, lineage) for lineage in lineages if lineage != self.lineage}
        return [one for lineage, path in paths.items() if path.exists() for one in _parsed(_whole_lines(path), lineage)]

    def has_step(self, step: int) -> bool:
        """Tell whether this lineage released something as that step before."""
        return any(release.lineage == self.lineage and release.step == step for release in self._releases.values())

    def counts(self, and_then: Mechanism | None = None, also: Iterable[Release] = ()) -> Counter[Mechanism]:
        """Count how often each mechanism was used, optionally as if united with others, and as if one more followed."""
        united = {release.release_id: release for release in also} | self._releases
        counts = Counter(release.mechanism for release in united.values())
        if and_then is not None:
            counts[and_then] += 1
        return counts

    def to_list(self) -> list[dict[str, Any]]:
        """Give every release as JSON data, for a checkpoint."""
        return [attrs.asdict(release) for release in self._releases.values()]

    def __contains__(self, release_id: object) -> bool:
        """Tell whether a release was made before."""
        return release_id in self._releases

    def _read(self) -> None:
        """Read the file; a torn last line belongs to an append that never returned, so nothing was released for it."""
        if not self._path.exists():
            self._create()
            return
        whole = _whole_lines(self._path)
        self._good_bytes = len(whole)
        self._releases = {release.release_id: release for release in _parsed(whole, self.lineage)}

    def _write(self) -> None:
        """Append what is not on disk yet, over whatever a failed attempt left behind the good part."""
        lines = [json.dumps(attrs.asdict(release), sort_keys=True) + "\n" for release in self._unwritten.values()]
        with self._path.open("r+b") as file:
            file.truncate(self._good_bytes)
            file.seek(self._good_bytes)
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            self._good_bytes = file.tell()
        self._unwritten = {}

    def _create(self) -> None:
        os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        for folder in (self._path.parent, self._path.parent.parent):  # the ledgers' folder may be new as well
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _path_of(folder: Path, lineage: str) -> Path:
    return folder / (hashlib.sha256(b"tg-tinker lineage\x00" + lineage.encode()).hexdigest()[:40] + ".jsonl")


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _parsed(lines: bytes, lineage: str) -> list[Release]:
    try:
        return [Release.from_dict(json.loads(line)) for line in lines.splitlines()]
    except ValueError as error:
        raise ServerError(f"the privacy ledger of {lineage} is damaged; ε cannot be known") from error
