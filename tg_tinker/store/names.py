"""Names that users choose: checked as labels, and never made into paths; folders carry a digest of the name instead."""

from __future__ import annotations

import hashlib
import re

from tg_tinker.errors import InvalidRequestError

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ARTIFACT_ID = re.compile(r"art-[0-9a-f]{32}")
_CONSTRAINT = "1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit"


def check_label(value: object, field: str) -> str:
    """Give back a tenant, run or checkpoint name that is well formed.

    Raises ``InvalidRequestError`` naming ``field``.
    """
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise InvalidRequestError(f"{field}: expected {_CONSTRAINT}", field=field, constraint=_CONSTRAINT)
    return value


def is_artifact_id(value: object) -> bool:
    """Tell whether a string has the form of the ids made here, and so may be part of a file name."""
    return isinstance(value, str) and _ARTIFACT_ID.fullmatch(value) is not None


def folder_name(tenant: str) -> str:
    """Name a tenant's folder or file: fixed length, one case, nothing of the user's text in it."""
    return hashlib.sha256(b"tg-tinker tenant\x00" + check_label(tenant, "tenant").encode()).hexdigest()[:40]
