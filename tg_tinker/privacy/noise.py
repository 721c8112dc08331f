"""Gaussian noise from a ChaCha20 keystream: the same step on the same data draws the same noise, any other its own.

The key is an HMAC under the server's secret, so nobody else can predict it, and no user's seed enters it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 1 << 16  # values made at a time


def step_key(
    secret: bytes, *, lineage: str, step: int, gradient_digest: str, noise_multiplier: float, max_grad_norm: float
) -> bytes:
    """Derive the 32-byte key of one step's noise from everything that defines the release."""
    message = b"".join(_framed(part.encode()) for part in ("tg-tinker noise v1", lineage, gradient_digest))
    message += struct.pack("<qdd", step, noise_multiplier, max_grad_norm)
    return hmac.new(secret, message, hashlib.sha256).digest()


def release_id(key: bytes) -> str:
    """Name a release by its noise key: a replay of the same release has the same name, and is not charged twice."""
    return hmac.new(key, b"tg-tinker release id", hashlib.sha256).hexdigest()[:32]


class NoiseStream:
    """Standard normal values, one after the other, from one key."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        self._keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def normal(self, count: int) -> NDArray[np.float64]:
        """Draw ``count`` values.

        Each is half the sum of four Box-Muller values, which hides the low bits that give a single one away
        (Holohan and Braghin 2021, arXiv:2107.10138).
        """
        values = np.empty(count, dtype=np.float64)
        for start in range(0, count, BLOCK):
            part = values[start : start + BLOCK]
            part[:] = self._box_muller(part.size) * 0.5
        return values

    def _box_muller(self, count: int) -> NDArray[np.float64]:
        """Sum four independent normals per value: two pairs of a radius and an angle."""
        uniforms = self._uniforms(4 * count).reshape(4, count)
        radius = np.sqrt(-2.0 * np.log(uniforms[:2]))
        angle = 2.0 * np.pi * uniforms[2:]
        total: NDArray[np.float64] = (radius * (np.cos(angle) + np.sin(angle))).sum(axis=0)
        return total

    def _uniforms(self, count: int) -> NDArray[np.float64]:
        """Draw multiples of 2**-53 in (0, 1]."""
        raw: NDArray[Any] = np.frombuffer(self._keystream.update(bytes(8 * count)), dtype="<u8")
        return ((raw >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53


def _framed(part: bytes) -> bytes:
    return struct.pack("<q", len(part)) + part
