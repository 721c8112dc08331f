"""Where state lives on this machine: one folder for models, keys, checkpoints and logs. It creates nothing."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["VARIABLE", "folder"]

VARIABLE = "TG_TINKER_HOME"


def folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Resolve the home folder: ``given``, else ``TG_TINKER_HOME``, else the platform's user data folder."""
    chosen = given or os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    import platformdirs  # loaded on use, so that `import tg_tinker` stays light

    return Path(platformdirs.user_data_dir("tg-tinker", appauthor=False)).resolve()
