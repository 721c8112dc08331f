"""``bt://loops:<run>/weights/<name>``: parsed whole and in one place; never joined into a path."""

from __future__ import annotations

import re

import attrs

from tg_tinker.types import checks

WEIGHTS = "weights"
SAMPLER_WEIGHTS = "sampler_weights"

_URI = re.compile(
    r"bt://loops:(?P<run>[A-Za-z0-9][A-Za-z0-9._-]{0,127})/(?P<kind>weights|sampler_weights)/"
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,127})"
)


@attrs.frozen
class CheckpointUri:
    """A checkpoint of a run, by kind and name."""

    run_id: str
    kind: str
    name: str

    def __str__(self) -> str:
        """The URI as it crosses the wire."""
        return f"bt://loops:{self.run_id}/{self.kind}/{self.name}"

    @classmethod
    def parse(cls, text: object, field: str = "path") -> CheckpointUri:
        """Take a URI apart; raises ``InvalidRequestError`` naming ``field``."""
        found = _URI.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise checks.refuse(field, "bt://loops:<run>/weights/<name> or .../sampler_weights/<name>", text)
        return cls(found["run"], found["kind"], found["name"])
