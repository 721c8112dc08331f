"""Where in the user's program a call came from: the first frame outside this package."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

_OURS = (str(Path(__file__).parent.parent) + os.sep, "<attrs generated")
_at: ContextVar[str | None] = ContextVar("tg_tinker_called_at", default=None)


@contextmanager
def called_at(site: str) -> Generator[None, None, None]:
    """Have everything inside count as called at ``site``: it runs at home, where the user's frames are not."""
    before = _at.get()
    _at.set(site)
    try:
        yield
    finally:
        _at.set(before)


def user_frame() -> FrameType:
    """The innermost frame of the stack that is not ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame


def user_site() -> str:
    """The file name and line of the user's call, such as ``"train.py:41"``."""
    known = _at.get()
    if known is not None:
        return known
    frame = user_frame()
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
