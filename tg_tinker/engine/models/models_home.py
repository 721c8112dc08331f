"""Where the built-in models live under the home folder; fetching them is ``tg-tinker models fetch``, not done here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tg_tinker.errors import ResourceNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SMOLLM2", "TINY", "cached_folder", "model_folder"]

TINY = "tg-tinker/tiny"
SMOLLM2 = "tg-tinker/smollm2-135m"

_PREFIX = "tg-tinker/"


def model_folder(home: Path, ref: str) -> Path:
    """Name the folder that a built-in model is cached in, whether or not it is there."""
    return home / "models" / ref.removeprefix(_PREFIX)


def cached_folder(home: Path, ref: str) -> Path:
    """Find the cached folder of a built-in model that needs one.

    Raises ``ResourceNotFoundError`` when the name is not built in, or was not fetched yet; it says how to fetch it.
    """
    if ref != SMOLLM2:
        message = f"there is no built-in model {ref!r}; the built-in names are {TINY} and {SMOLLM2}"
        raise ResourceNotFoundError(message, resource_type="model", resource_id=ref)
    folder = model_folder(home, ref)
    if not (folder / "config.json").is_file():
        name = ref.removeprefix(_PREFIX)
        message = f"{ref} is not in {folder} yet: run `tg-tinker models fetch {name}` once"
        raise ResourceNotFoundError(message, resource_type="model", resource_id=ref)
    return folder
