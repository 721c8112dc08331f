"""One row of a wire table: an operation, where it lives, how it answers, and the type of its answer."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar
from urllib.parse import quote

import attrs

R = TypeVar("R")

#: "submit": accepted at once, the outcome is retrieved later. "request": answered in one round trip. "stream": frames.
Kind = Literal["submit", "request", "stream"]


@attrs.frozen
class Route(Generic[R]):
    """``path`` is a template such as ``/v1/futures/{id}``; ``returns`` is the type of the (final) answer.

    A submit takes its place in the run's order; a request and its retries stand alone.
    """

    operation: str
    method: str
    path: str
    returns: type[R]
    kind: Kind = "request"

    def url(self, **parts: str) -> str:
        """The path with its parts filled in, each quoted whole, so that no id can reach another route."""
        return self.path.format(**{name: quote(part, safe="") for name, part in parts.items()})
