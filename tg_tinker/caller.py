"""Where in the user's program a call came from: the first frame outside this package."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

_OURS = (str(Path(__file__).parent) + os.sep, "<attrs generated")


def user_frame() -> FrameType:
    """The innermost frame of the stack that is not ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame


def user_site() -> str:
    """The file name and line of the user's call, such as ``"train.py:41"``."""
    frame = user_frame()
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
