"""Canonical bytes and SHA-256: batch hashes, gradient hashes, the links of the audit chain.

A digest reads ``"sha256:<hex>"``, or ``"hmac-sha256:<hex>"`` where a key was given (then it tells outsiders nothing).
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tg_tinker.types.batch import BatchData

if TYPE_CHECKING:
    from numpy.typing import NDArray


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys, no spaces, ASCII only, and no NaN: equal data gives equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def sha256_hex(data: bytes, key: bytes | None = None) -> str:
    """The digest of some bytes."""
    return _finish(_start(key, data), key)


def tensor_digest(tensors: Mapping[str, NDArray[Any]], key: bytes | None = None) -> str:
    """The digest of named arrays: names sorted, each with dtype, shape and little-endian row-major bytes."""
    digest = _start(key)
    for piece in _canonical_tensors(tensors):
        digest.update(piece)
    return _finish(digest, key)


def batch_hash(batch: BatchData | Mapping[str, Any], key: bytes | None = None) -> str:
    """The hash of a batch, as the server computes it: pass it to ``forward_backward`` to have it verified."""
    checked = BatchData.of(batch)
    arrays = {"input_ids": checked.input_ids, "attention_mask": checked.attention_mask}
    if checked.labels is not None:
        arrays["labels"] = checked.labels
    return tensor_digest(arrays, key)


def _canonical_tensors(tensors: Mapping[str, NDArray[Any]]) -> Iterator[bytes | memoryview]:
    import numpy as np

    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
        header = canonical_json([name, array.dtype.newbyteorder("<").str, list(array.shape)])
        yield len(header).to_bytes(4, "little") + header
        yield array.tobytes() if array.ndim == 0 else array.ravel().view(np.uint8).data


def _start(key: bytes | None, data: bytes = b"") -> Any:
    return hashlib.sha256(data) if key is None else hmac.new(key, data, hashlib.sha256)


def _finish(digest: Any, key: bytes | None) -> str:
    return f"{'sha256' if key is None else 'hmac-sha256'}:{digest.hexdigest()}"
