"""What a tenant may store: refused in time, by a typed error that says what to do."""

from __future__ import annotations

from pathlib import Path

from fixtures.fake_engine import MODEL
from fixtures.server_client import Client

from tg_tinker.errors import QuotaExceededError
from tg_tinker.wire.errors import from_wire


def stored(home: Path) -> int:
    """Bytes of ciphertext on disk."""
    return sum(path.stat().st_size for path in (home / "artifacts").rglob("*.sealed"))


async def one_artifact(serve, home: Path) -> int:
    """How much a saved state takes here."""
    client: Client = await serve()
    await client.run(f"{await client.create(MODEL)}/save_state")
    size = stored(home)
    (artifact,) = (await client.get("/v1/artifacts")).json
    await client.call("DELETE", f"/v1/artifacts/{artifact['artifact_id']}")
    return size


async def test_a_save_over_the_quota_is_refused(serve, tmp_path):
    """A save that does not fit is a 403 with the numbers, leaves nothing behind, and fits once something is deleted."""
    size = await one_artifact(serve, tmp_path)
    client = await serve(quota_bytes=2 * size + size // 2)
    run = await client.create(MODEL)
    for _ in range(2):
        assert (await client.post(f"{run}/save_state")).status < 300
    refused = await client.post(f"{run}/save_state")
    assert (refused.status, refused.error["code"]) == (403, "QUOTA_EXCEEDED")
    error = from_wire(refused.error, refused.status)
    assert isinstance(error, QuotaExceededError)
    assert (error.used_bytes, error.needed_bytes, error.allowed_bytes) == (2 * size, size, 2 * size + size // 2)
    assert "delete artifacts" in error.message
    assert "ttl_seconds" in error.message
    assert stored(tmp_path) == 2 * size
    other = client.as_tenant("other-key")
    assert (await other.post(f"{await other.create(MODEL)}/save_state")).status < 300
    (_, oldest) = (await client.get("/v1/artifacts")).json
    await client.call("DELETE", f"/v1/artifacts/{oldest['artifact_id']}")
    assert (await client.post(f"{run}/save_state")).status < 300


async def test_what_is_kept_aside_gives_way(serve, tmp_path):
    """Versions that their names moved on from never keep a tenant from saving: the oldest of them go first."""
    client = await serve()
    trainer, _ = await client.trainer(MODEL)
    await client.operate(trainer, "save_weights_for_sampler", {"name": "x"})
    size = stored(tmp_path)
    client = await serve(quota_bytes=4 * size - size // 2)
    trainer, sampler = await client.trainer(MODEL)
    for _ in range(8):
        done = await client.operate(trainer, "save_weights_for_sampler", {"name": "y"})
        assert done["status"] == "done"
        assert stored(tmp_path) < 4 * size
    pinned = {"X_TG_Exact_Policy_Version": "7"}
    assert (await client.post(f"{sampler}/sample", {"prompt": [1], "max_tokens": 1}, **pinned)).status == 200
    over = await client.operate(trainer, "save_weights_for_sampler", {"name": "z"})
    assert over["status"] == "done"
    over = await client.operate(trainer, "save_weights_for_sampler", {"name": "zz"})
    assert (over["status"], over["code"]) == ("error", "QUOTA_EXCEEDED")
