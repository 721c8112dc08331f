"""The test vectors, read once, and the tiny model, loaded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tg_tinker.engine.models import base_model
from tg_tinker.engine.models.base_model import BaseModel

VECTORS = Path(__file__).parents[1] / "vectors"


@pytest.fixture(scope="session")
def clip_vectors() -> dict[str, Any]:
    """Read the clipping vectors."""
    return json.loads((VECTORS / "dp_clip_vectors.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Load the tiny model in double precision."""
    home = tmp_path_factory.mktemp("home")
    return base_model.load("tg-tinker/tiny", home=home, device="cpu", dtype="float64")
