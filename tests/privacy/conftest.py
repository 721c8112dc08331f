"""The test vectors, read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(__file__).parents[1] / "vectors"


@pytest.fixture(scope="session")
def clip_vectors() -> dict[str, Any]:
    """Read the clipping vectors."""
    return json.loads((VECTORS / "dp_clip_vectors.json").read_text(encoding="utf-8"))
