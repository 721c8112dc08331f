"""A checkpoint store with one sealed artifact in it; every statement of a database is held against another dialect."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import sqlalchemy
from sqlalchemy.dialects import postgresql

from tg_tinker.store.checkpoints import ArtifactRecord, CheckpointStore
from tg_tinker.store.keys import KeyFile

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(autouse=True)
def portable() -> Iterator[None]:
    """Let no test here execute a statement that PostgreSQL's dialect cannot say: SQLite is not the last database."""

    def told(_: object, statement: Any, *__: object) -> None:
        statement.compile(dialect=postgresql.dialect())

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_execute", told)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "before_execute", told)


@attrs.frozen
class Vault:
    """A store, its keys, and the folder of both."""

    folder: Path
    keys: KeyFile
    store: CheckpointStore

    def save(self, tenant: str = "acme", **changes: Any) -> ArtifactRecord:
        """Seal a small state."""
        fields: dict[str, Any] = {
            "run_id": "run-1",
            "kind": "tg_state",
            "step": 3,
            "tensors": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float64([[0.5]])},
            "counters": {"step": 3, "nested": {"seed": 7}},
            "metadata": {"epoch": 5},
        }
        return self.store.save(tenant=tenant, **{**fields, **changes})

    def files(self, record: ArtifactRecord) -> tuple[Path, Path]:
        """Give the paths of an artifact's manifest and ciphertext."""
        (manifest,) = self.folder.rglob(f"{record.artifact_id}.json")
        return manifest, manifest.with_suffix(".sealed")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """Make an empty store."""
    keys = KeyFile(tmp_path / "keys")
    return Vault(tmp_path, keys, CheckpointStore(tmp_path / "artifacts", keys))
