"""Refusing a value in the engine: the same words, and the same fields of the error, as everywhere else."""

from __future__ import annotations

from tg_tinker.types import checks

__all__ = ["require"]


def require(holds: bool, field: str, constraint: str, value: object) -> None:
    """Raise ``InvalidRequestError``, naming ``field`` and what was expected of it, unless ``holds``."""
    if not holds:
        raise checks.refuse(field, constraint, value)
