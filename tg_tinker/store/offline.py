"""Open a pulled artifact without a server and without torch, with the key its owner exported."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.store import container, sealing
from tg_tinker.store.keyring import KeyRing
from tg_tinker.types import checks

if TYPE_CHECKING:
    import numpy as np


@attrs.frozen
class Opened:
    """A verified artifact: its readable manifest, its tensors by name, its counters."""

    manifest: dict[str, Any]
    tensors: dict[str, np.ndarray[Any, Any]]
    counters: dict[str, Any]


def open_artifact(data: bytes | Path, key: bytes | Path) -> Opened:
    """Verify and decrypt what ``pull_artifact`` gave, using a key file of ``tg-tinker artifacts export-key``.

    Raises ``ResourceNotFoundError`` (code KEY_NOT_FOUND) or ``InvalidRequestError`` (ARTIFACT_MISMATCH,
    ARTIFACT_DAMAGED, or ``field="key"`` for bytes that are no key file).
    """
    manifest, ciphertext = sealing.unbundle(_content("data", data))
    ring = KeyRing.from_bytes(_content("key", key))
    content = sealing.unseal(manifest, BytesIO(ciphertext), len(ciphertext), ring.unwrap)
    tensors, counters = container.unpack_arrays(content)
    return Opened(manifest.fields(), tensors, counters)


def _content(field: str, source: object) -> bytes:
    if isinstance(source, Path):
        return source.read_bytes()
    if not isinstance(source, bytes):
        raise checks.refuse(field, "bytes, or the pathlib.Path of a file", source)
    return source
