"""Where a server takes the keys from that seal what it saves."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tg_tinker.server.settings import Settings
from tg_tinker.server.storage import _Files
from tg_tinker.store.keys import VARIABLE, KeyEnvironment


def test_master_keys_in_the_environment_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TG_TINKER_MASTER_KEYS set, artifacts are sealed under keys derived from it, and no key file is made."""
    monkeypatch.setenv(VARIABLE, base64.b64encode(bytes(32)).decode())
    opened = _Files.open(Settings(home=tmp_path))
    try:
        record = opened.store.save(
            tenant="acme", run_id="run-1", kind="tg_state", step=0, tensors={}, counters={}, metadata={}
        )
    finally:
        opened.ownership.release()
    assert record.encryption.key_id == KeyEnvironment().current("acme")
    assert not (tmp_path / "keys").exists()
