"""A YAML file as plain values. PyYAML reads YAML 1.1, where 1e-4 is a string; here it is the number that is meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tg_tinker.errors import InvalidRequestError

__all__ = ["read"]

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """The safe loader, with the floats of YAML 1.2 beside its own."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read(path: str | Path) -> Any:
    """What is in the file; raises ``InvalidRequestError`` where it cannot be read."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506 - it is a safe one
    except (OSError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidRequestError(f"cannot read the config {path}: {error}", field="path") from error
