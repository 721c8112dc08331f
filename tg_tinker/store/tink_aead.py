"""The only door to Google Tink: AEAD for wrapping keys, streaming AEAD for artifacts.

Not for deciding what is bound to what (``sealing``). Tink's own errors stop here: callers get None or ``Unauthentic``.
"""

from __future__ import annotations

import functools
import importlib
import io
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from pathlib import Path

KEY_BYTES = 32
STREAM_FORMAT = "tink/AES256_GCM_HKDF_1MB"
CHUNK = 1 << 20
_AES_GCM = "type.googleapis.com/google.crypto.tink.AesGcmKey"


class UnauthenticError(Exception):
    """The bytes were not made with this key and this associated data."""


class _Sink(io.RawIOBase):
    """Takes ciphertext and keeps a failure for later: Tink would bury it, and fail once more when collected."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """Say yes."""
        return True

    def write(self, data: Any) -> int:
        """Write on, unless something went wrong before."""
        try:
            if self.failure is None:
                self._file.write(data)
        except OSError as error:
            self.failure = error
        return len(data)


@functools.cache
def _tink() -> Any:
    """Import and register Tink once, or say how to install it."""
    try:
        tink = importlib.import_module("tink")
        for primitive in ("aead", "streaming_aead"):
            importlib.import_module(f"tink.{primitive}").register()
        for needed in ("secret_key_access", "proto.aes_gcm_pb2", "proto.tink_pb2"):
            importlib.import_module(f"tink.{needed}")
    except ImportError as error:
        raise InvalidRequestError(
            "sealed artifacts need Google Tink: pip install 'tg-tinker[verify]' (or [server])", code="EXTRA_MISSING"
        ) from error
    return tink


def wrap(key: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
    """Encrypt a few bytes under a 32-byte key: AES-256-GCM, fresh random nonce in front."""
    return cast("bytes", _aead(key).encrypt(plaintext, associated_data))


def unwrap(key: bytes, ciphertext: bytes, associated_data: bytes) -> bytes:
    """Undo ``wrap``.

    Raises ``UnauthenticError``.
    """
    try:
        return cast("bytes", _aead(key).decrypt(ciphertext, associated_data))
    except _tink().TinkError as error:
        raise UnauthenticError from error


def new_stream_keyset() -> bytes:
    """Make a fresh keyset for one stream, serialized."""
    tink = _tink()
    handle = tink.new_keyset_handle(tink.streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB)
    return cast("bytes", tink.proto_keyset_format.serialize(handle, tink.secret_key_access.TOKEN))


def encrypt_stream(keyset: bytes, plaintext: bytes, destination: Path, associated_data: bytes) -> int:
    """Encrypt into a file and give back its size.

    Raises ``OSError`` where the file cannot be written.
    """
    view = memoryview(plaintext)
    with destination.open("wb") as file:
        sink = _Sink(file)
        with _streaming(keyset).new_encrypting_stream(sink, associated_data) as stream:
            for start in range(0, len(view), CHUNK):
                stream.write(view[start : start + CHUNK])
        if sink.failure is not None:
            raise sink.failure
    return destination.stat().st_size


def decrypt_stream(keyset: bytes, source: BinaryIO, associated_data: bytes) -> bytes:
    """Decrypt a whole stream; nothing is given out before its last segment has been verified.

    Raises ``UnauthenticError``.
    """
    plaintext = io.BytesIO()
    try:
        with _streaming(keyset).new_decrypting_stream(source, associated_data) as stream:
            while chunk := stream.read(CHUNK):
                plaintext.write(chunk)
    except _tink().TinkError as error:
        raise UnauthenticError from error
    return plaintext.getvalue()


def _streaming(keyset: bytes) -> Any:
    tink = _tink()
    handle = tink.proto_keyset_format.parse(keyset, tink.secret_key_access.TOKEN)
    return handle.primitive(tink.streaming_aead.StreamingAead)


def _aead(key: bytes) -> Any:
    tink = _tink()
    material = tink.proto.aes_gcm_pb2.AesGcmKey(version=0, key_value=key).SerializeToString()
    proto = tink.proto.tink_pb2
    data = proto.KeyData(type_url=_AES_GCM, value=material, key_material_type=proto.KeyData.SYMMETRIC)
    entry = proto.Keyset.Key(key_id=1, status=proto.ENABLED, output_prefix_type=proto.RAW, key_data=data)
    keyset = proto.Keyset(primary_key_id=1, key=[entry]).SerializeToString()
    handle = tink.proto_keyset_format.parse(keyset, tink.secret_key_access.TOKEN)
    return handle.primitive(tink.aead.Aead)
