"""The shared server is what ``ServiceClient()`` finds, as on a reader's machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.embedded import home, service, tc, trainer

from tg_tinker import ServiceClient

__all__ = ["home", "service", "tc", "trainer"]


@pytest.fixture(autouse=True)
def readers_machine(home: Path, service: ServiceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting but the home folder."""
    monkeypatch.setenv("TG_TINKER_HOME", str(home))
    for name in ("API_KEY", "BASE_URL", "TENANT_ID"):
        monkeypatch.delenv(f"TG_TINKER_{name}", raising=False)
        monkeypatch.delenv(f"TS_{name}", raising=False)
    for name in ("BASETEN_API_KEY", "LOOPS_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
