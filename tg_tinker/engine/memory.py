"""Tell running out of memory from other failures, and turn it into an error that says what to do."""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from tg_tinker.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["guard", "is_exhausted"]

_SIGNS = ("can't allocate memory", "out of memory", "not enough memory", "Cannot allocate memory")


def is_exhausted(error: BaseException) -> bool:
    """Say whether ``error`` means that memory ran out; the CPU allocator of torch has no class of its own for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def guard(doing: str, advice: str) -> Generator[None]:
    """Raise a ``ServerError`` with ``advice`` when the block runs out of memory; let everything else through.

    The error's ``code`` is ``OUT_OF_MEMORY``.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_exhausted(error):
            raise
        # Whoever keeps the error would otherwise keep every tensor that the failed frames hold.
        traceback.clear_frames(error.__traceback__)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ServerError(f"out of memory while {doing}: {advice} ({reason})", code="OUT_OF_MEMORY") from error
