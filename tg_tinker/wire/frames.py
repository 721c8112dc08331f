"""Length-delimited frames of a streamed response: four little-endian length bytes, then that many bytes of JSON.

A stream is any number of ``{"item": ...}`` frames and then exactly one ``{"end": true}`` or ``{"error": {...}}`` frame,
so a broken connection is never mistaken for the end.
"""

from __future__ import annotations

from typing import Any

from tg_tinker.errors import ServerError
from tg_tinker.wire import codec

CONTENT_TYPE = "application/vnd.tg-tinker.frames"
LARGEST = 64 * 1024 * 1024
END = {"end": True}


def pack(frame: object) -> bytes:
    """One frame, ready to be written."""
    body = codec.dumps(frame)
    return len(body).to_bytes(4, "little") + body


class FrameReader:
    """Cuts a byte stream into frames, whatever the boundaries of the pieces that arrive."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Take some bytes; give the frames that are now complete. Raises ``ServerError`` for an absurd length."""
        self._rest += data
        frames = []
        while len(self._rest) >= 4:
            size = int.from_bytes(self._rest[:4], "little")
            if size > LARGEST:
                raise ServerError(f"the stream announces a frame of {size} bytes; the limit is {LARGEST}")
            if len(self._rest) < 4 + size:
                break
            frames.append(codec.loads(bytes(self._rest[4 : 4 + size])))
            del self._rest[: 4 + size]
        return frames
