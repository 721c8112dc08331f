"""A misspelt argument is refused with the nearest name there is."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["suggesting"]

P = ParamSpec("P")
R = TypeVar("R")


def suggesting(plan: Callable[P, R]) -> Callable[P, R]:
    """Refuse unknown keywords as Python does, with a ``TypeError``, and say what may have been meant."""
    known = list(inspect.signature(plan).parameters)[1:]

    @functools.wraps(plan)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
                raise TypeError(f"{plan.__name__}() got an unexpected keyword argument {name!r}; {hint}")
        return plan(*args, **kwargs)

    return checked
