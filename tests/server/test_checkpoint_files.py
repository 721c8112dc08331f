from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from fixtures.server_client import Client, datum

from tg_tinker.server import limits
from tg_tinker.server.engine import TorchEngine
from tg_tinker.server.middleware import ROOMS

TINY = "tg-tinker/tiny"


@pytest.fixture
async def real(serve, tmp_path: Path) -> Client:
    """A client of a server with the real engine."""
    return await serve(engine=TorchEngine(home=tmp_path, threads=1))


async def test_checkpoints_are_listed_and_their_files_fetched(real, tmp_path):
    """Signed URLs give a peft folder that peft loads; sizes and checksums hold; a page ends where it says."""
    trainer, _ = await real.trainer(TINY)
    run_id = trainer.rpartition("/")[2]
    await real.operate(trainer, "forward_backward", {"data": [datum(1, 2, 3)]})
    await real.operate(trainer, "optim_step", {"adam_params": {}})
    await real.operate(trainer, "save_state", {"name": "s", "ttl_seconds": 3600})
    path = (await real.operate(trainer, "save_weights_for_sampler", {"name": "p"}))["result"]["path"]
    listed = (await real.get(f"/v1/loops/checkpoints?run_id={run_id}")).json["checkpoints"]
    assert [(one["checkpoint_id"], one["target"]) for one in listed] == [("s", "trainer"), ("p", "sampler")]
    assert listed[0]["expires_at"] is not None
    (by_path,) = (await real.get(f"/v1/loops/checkpoints?checkpoint_path={path}")).json["checkpoints"]
    assert by_path["id"] == listed[1]["id"]
    assert len((await real.get(f"/v1/loops/checkpoints?base_model={TINY}")).json["checkpoints"]) == 2
    assert (await real.get("/v1/loops/checkpoints")).status == 422
    assert (await real.post("/v1/loops/checkpoints/validate", {"checkpoint_path": path})).json == {}
    state = {"checkpoint_path": f"bt://loops:{run_id}/weights/s"}
    assert "does not serve sampling" in (await real.post("/v1/loops/checkpoints/validate", state)).error["message"]
    assert (await real.get(f"/v1/loops/checkpoints/{by_path['id']}/source")).json == {"source": {"kind": "s3"}}

    page = (await real.get(f"/v1/loops/checkpoints/{by_path['id']}/files?page_size=1")).json
    assert (page["next_page_token"], page["total_count"]) == (1, 2)
    rest = (await real.get(f"/v1/loops/checkpoints/{by_path['id']}/files?page_token=1")).json
    assert rest["next_page_token"] is None
    for file in page["presigned_urls"] + rest["presigned_urls"]:
        async with real.session.get(file["url"]) as response:
            content = await response.read()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size_bytes"], file["sha256"])
        (tmp_path / Path(file["relative_file_name"]).name).write_bytes(content)

    from peft import LoraConfig
    from safetensors.numpy import load_file

    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.base_model_name_or_path) == (4, TINY)
    assert all(name.startswith("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors"))
    state = (await real.get(f"/v1/loops/checkpoints/{listed[0]['id']}/files")).json
    names = [file["relative_file_name"] for file in state["presigned_urls"]]
    assert names == [
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "trainer/state.safetensors", "trainer/counters.json",
    ]  # fmt: skip


async def test_a_signed_url_opens_one_file_for_a_while(real, monkeypatch):
    """A forged, a borrowed and an expired URL are 403; a deleted checkpoint is 404."""
    trainer, _ = await real.trainer(TINY)
    await real.operate(trainer, "save_weights_for_sampler", {"name": "p"})
    (checkpoint,) = (await real.get(f"/v1/loops/checkpoints?base_model={TINY}")).json["checkpoints"]
    files = (await real.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files")).json["presigned_urls"]
    stranger = real.as_tenant(None)
    url = files[0]["url"].replace(str(real.server.make_url("/")), "/")
    assert json.loads((await stranger.get(url)).body)["r"] == 4
    token, name = url.rsplit("/", 2)[1:]
    flipped = token[:-1] + ("0" if token[-1] != "0" else "1")
    other = files[1]["url"].rsplit("/", 1)[1]
    for bad in (f"{flipped}/{name}", f"{token}/{other}", f"{token.partition('.')[0]}./{name}"):
        assert (await stranger.get(f"/v1/loops/files/{bad}")).status == 403
    monkeypatch.setattr("tg_tinker.server.training.exports.time", lambda: 4e9)
    assert (await stranger.get(url)).status == 403
    monkeypatch.undo()
    await real.call("DELETE", f"/v1/artifacts/{checkpoint['id']}")
    monkeypatch.setattr(limits, "monotonic", lambda: 100.0)
    monkeypatch.setattr(real.server.app[ROOMS], "rate_limit", limits.RateLimit(1))
    assert [(await stranger.get(url)).status for _ in range(2)] == [
        404,
        429,
    ]  # each goes on record, at the tenant's rate


async def test_a_file_is_served_from_any_byte_on(real):
    """A range is answered with that part of the file; one behind its end, or more than one, is refused as such."""
    trainer, _ = await real.trainer(TINY)
    await real.operate(trainer, "save_weights_for_sampler", {"name": "p"})
    (checkpoint,) = (await real.get(f"/v1/loops/checkpoints?base_model={TINY}")).json["checkpoints"]
    listing = (await real.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files")).json
    file = listing["presigned_urls"][1]
    url, size = file["url"].replace(str(real.server.make_url("/")), "/"), file["size_bytes"]
    whole = await real.get(url)
    assert (whole.status, whole.headers["Accept-Ranges"], len(whole.body)) == (200, "bytes", size)
    for asked, start, stop in (("100-", 100, size), ("0-9", 0, 10), ("-5", size - 5, size)):
        part = await real.get(url, Range=f"bytes={asked}")
        assert (part.status, part.body) == (206, whole.body[start:stop])
        assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
    behind = await real.get(url, Range=f"bytes={size}-")
    assert (behind.status, behind.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert behind.error["details"]["field"] == "Range"
    assert (await real.get(url, Range="bytes=0-1,3-4")).status == 422
