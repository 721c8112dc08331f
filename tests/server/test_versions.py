"""Published versions: how long each can be sampled from, what deleting one does, and what they cost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
from fixtures.fake_engine import MODEL
from fixtures.server_client import Answer, Client, datum

from tg_tinker.errors import ServerError
from tg_tinker.server.api.common import CREATION
from tg_tinker.server.engine import TorchEngine
from tg_tinker.server.middleware import ROOMS
from tg_tinker.server.sweeping import Sweeping
from tg_tinker.wire import headers

PASS = {"data": [datum(1, 2, 3)], "loss_fn": "cross_entropy", "loss_fn_config": None}
ADAM = {"adam_params": {"learning_rate": 4e-2}}


@attrs.frozen
class Trained:
    """A run whose version number n adds n to every token."""

    client: Client
    trainer: str
    sampler: str

    @classmethod
    async def start(cls, client: Client, **fields: object) -> Trained:
        """Make the run."""
        return cls(client, *await client.trainer(MODEL, **fields))

    async def publish(self, *names: str, **fields: object) -> list[str]:
        """Train a step and publish it, once for each name; gives the artifacts."""
        made = []
        for name in names:
            await self.client.operate(self.trainer, "forward_backward", PASS)
            await self.client.operate(self.trainer, "optim_step", ADAM)
            done = await self.client.operate(self.trainer, "save_weights_for_sampler", {"name": name, **fields})
            assert done["status"] == "done", done
            (newest,) = (await self.client.get("/v1/artifacts?limit=1")).json
            made.append(newest["artifact_id"])
        return made

    async def ask(self, **headers: str) -> Answer:
        """One token after 10."""
        return await self.client.post(f"{self.sampler}/sample", {"prompt": [10], "max_tokens": 1}, **headers)

    async def tokens(self, versions: Sequence[int]) -> list[int | str]:
        """What each version says after 10, or why it does not."""
        answers = [await self.ask(X_TG_Exact_Policy_Version=str(version)) for version in versions]
        return [said(answer) for answer in answers]

    def path(self, name: str) -> str:
        """The URI of a name."""
        return self.trainer.replace("/loops/trainers/", "bt://loops:") + f"/sampler_weights/{name}"


def said(answer: Answer) -> int | str:
    """The token of an answer, or the code of its error."""
    return answer.json["choices"][0]["token_ids"][0] if answer.status == 200 else answer.error["code"]


def files(home: Path, suffix: str) -> int:
    """How many files of a kind there are among the artifacts."""
    return len(list((home / "artifacts").rglob(f"art-*{suffix}")))


async def test_a_publish_that_failed_is_not_served(serve, monkeypatch):
    """A version that could not be written, by itself or with a state, is taken back: the newest is the one before."""
    client = await serve()
    run = await Trained.start(client, with_sampler=True)
    await run.publish("a")
    store = client.server.app[ROOMS].store
    save = store.save

    def refuse(**_: object) -> None:
        raise ServerError("the disk is full")

    monkeypatch.setattr(store, "save", refuse)
    for operation in ("save_weights_for_sampler", "save_state"):
        failed = await client.operate(run.trainer, operation, {"name": "b"})
        assert (failed["status"], failed["error"]) == ("error", "the disk is full")
        assert (await run.ask()).headers[headers.SERVED_POLICY_VERSION] == "1"
    monkeypatch.setattr(store, "save", save)
    await run.publish("b")
    gone = "SAMPLER_VERSION_NOT_FOUND"
    assert await run.tokens([1, 2, 3, 4]) == [12, gone, gone, 13]


async def test_a_version_outlives_its_name(serve):
    """Every version goes on saying what it said when its name has moved on and memory has dropped it."""
    client = await serve(versions_kept=2)
    run = await Trained.start(client)
    await run.publish("a", "b", "same", "same", "same", "same", "same")
    (live,) = client.server.app[ROOMS].runs
    assert len(live.versions) == 2
    assert await run.tokens(range(8)) == [11, 12, 13, 14, 15, 16, 17, 18]
    assert said(await run.ask(X_Checkpoint_Path=run.path("same"))) == 18
    listed = (await client.get(f"/v1/loops/checkpoints?run_id={live.id}")).json["checkpoints"]
    assert [one["checkpoint_id"] for one in listed] == ["a", "b", "same"]


async def test_a_version_is_read_back_to_the_bit(serve, tmp_path):
    """A version of the real engine samples the same tokens with the same logprobs after it left memory."""
    client = await serve(engine=TorchEngine(home=tmp_path, threads=1), versions_kept=1)
    run = Trained(client, *await client.trainer("tg-tinker/tiny"))

    async def sampled(version: int) -> object:
        body = {"prompt": [5, 6, 7], "max_tokens": 8, "seed": 3, "logprobs": 0}
        answer = await client.post(f"{run.sampler}/sample", body, X_TG_Exact_Policy_Version=str(version))
        (choice,) = answer.json["choices"]
        return choice["token_ids"], choice["logprobs"]

    await run.publish("x")
    before = await sampled(1)
    await run.publish("x", "x")
    (live,) = client.server.app[ROOMS].runs
    live.versions._leases.clear()
    await run.publish("x")
    assert len(live.versions) == 1
    assert await sampled(1) == before
    assert await sampled(4) != before


async def test_a_key_rotation_leaves_no_version_behind(serve):
    """A version whose name has moved on is put under the new key with the others, and opens."""
    client = await serve(versions_kept=1)
    run = await Trained.start(client)
    await run.publish("same", "same", "same")
    store = client.server.app[ROOMS].store
    store._keys.rotate("tenant-a")
    assert store.rewrap("tenant-a") == 3
    assert await run.tokens([1, 2, 3]) == [12, 13, 14]


async def test_what_is_kept_aside_is_bounded(serve, tmp_path):
    """Of versions that their names moved on from, those asked for last are kept, as many as fit; then it is said so."""
    client = await serve(versions_kept=1)
    run = await Trained.start(client)
    await run.publish("x")
    (size,) = (path.stat().st_size for path in (tmp_path / "artifacts").rglob("*.sealed"))
    (live,) = client.server.app[ROOMS].runs
    live.versions.shelf._most_aside = 3 * size + size // 2
    await run.publish("x", "x", "x")
    live.versions._leases.clear()
    assert await run.tokens([1]) == [12]
    await run.publish("x", "x")
    gone = "SAMPLER_VERSION_NOT_FOUND"
    assert await run.tokens(range(1, 7)) == [12, gone, gone, 15, 16, 17]
    assert (files(tmp_path, ".aside"), files(tmp_path, ".json"), files(tmp_path, ".sealed")) == (3, 1, 4)


@pytest.mark.timeout(300)  # each of them is sealed and synced
async def test_a_thousand_publishes_leave_memory_and_disk_flat(serve, tmp_path):
    """After 1000 publishes under one name a run holds as many versions, and the disk as many bytes, as may be kept."""
    client = await serve(aside_bytes=20_000)
    trainer, sampler = await client.trainer(MODEL)
    rooms = client.server.app[ROOMS]
    (run,) = rooms.runs
    for start in range(0, 1000, 50):
        keys = [f"k{start}.{number}" for number in range(50)]
        posts = (
            client.post(f"{trainer}/save_weights_for_sampler", {"name": "rollout"}, Idempotency_Key=key) for key in keys
        )
        assert {answer.status for answer in await asyncio.gather(*posts)} == {202}
        assert (await client.get(f"{trainer}/operations/{keys[-1]}?wait=30")).json["status"] == "done"
        pinned = {"X_TG_Exact_Policy_Version": str(start + 50)}
        assert (await client.post(f"{sampler}/sample", {"prompt": [1], "max_tokens": 1}, **pinned)).status == 200
    assert run.versions.newest == 1000
    assert len(run.versions) <= 8 + 16 + 1
    assert len(run.versions.shelf._stored) <= 20_000 // 400 + 1
    assert sum(path.stat().st_size for path in (tmp_path / "artifacts").rglob("*.sealed")) <= 20_000 + 500
    assert len(await asyncio.to_thread(rooms.store.list, "tenant-a")) == 1


async def test_the_end_of_a_run_gives_the_disk_back(serve, tmp_path, monkeypatch):
    """What names moved on from goes with its run: deleted, ended with its server, or left by one that was killed."""
    client = await serve()
    rooms = client.server.app[ROOMS]
    runs = [await Trained.start(client) for _ in range(2)]
    for run in runs:
        await run.publish("x", "x")
    await Sweeping(rooms).sweep()
    assert files(tmp_path, ".aside") == 2
    first = rooms.runs.find("tenant-a", runs[0].trainer.rpartition("/")[2])
    assert first is not None
    await client.server.app[CREATION].end(first)
    assert files(tmp_path, ".aside") == 1
    monkeypatch.setattr(rooms, "_clear_aside", lambda: None)  # as if it were killed
    await client.server.close()
    later = await serve()
    assert files(tmp_path, ".aside") == 1
    await Sweeping(later.server.app[ROOMS]).sweep()
    assert files(tmp_path, ".aside") == 0
    await (await Trained.start(later)).publish("x", "x")
    await later.server.close()
    assert (files(tmp_path, ".aside"), files(tmp_path, ".json")) == (0, 3)


@pytest.mark.parametrize("kept", [1, 8])
async def test_what_was_deleted_is_not_served(serve, kept):
    """After DELETE a version is not found: by its number, by its name, as the newest; in memory or read from disk."""
    client = await serve(versions_kept=kept)
    run = await Trained.start(client)
    artifacts = await run.publish("a", "b", "c")
    assert await run.tokens([1, 2, 3]) == [12, 13, 14]
    assert said(await run.ask(X_Checkpoint_Path=run.path("a"))) == 12
    for artifact in (artifacts[0], artifacts[2]):
        assert (await client.call("DELETE", f"/v1/artifacts/{artifact}")).status == 200
    gone = "SAMPLER_VERSION_NOT_FOUND"
    assert await run.tokens([1, 2, 3]) == [gone, 13, gone]
    assert said(await run.ask(X_Checkpoint_Path=run.path("a"))) == "CHECKPOINT_NOT_FOUND"
    assert said(await run.ask()) == gone
    await run.publish("d")
    assert said(await run.ask()) == 15


async def test_what_another_server_deleted_is_not_served(serve):
    """A checkpoint that one server of a home has read, and another deletes, is not found at the first."""
    client, other = await serve(), await serve()
    run = await Trained.start(client)
    (artifact,) = await run.publish("a")
    made = (await other.post("/v1/loops/samplers", {"model_path": run.path("a")})).json["sampler"]
    body = {"prompt": [10], "max_tokens": 1}
    assert said(await other.post(f"/loops/samplers/{made['id']}/sample", body)) == 12
    await client.call("DELETE", f"/v1/artifacts/{artifact}")
    assert said(await other.post(f"/loops/samplers/{made['id']}/sample", body)) == "CHECKPOINT_NOT_FOUND"


async def test_a_time_to_live_holds_for_versions(serve, monkeypatch):
    """A version published with a ttl stays through its name's next use, and ends with its ttl, also in memory."""
    run = await Trained.start(await serve(versions_kept=1))
    await run.publish("x", ttl_seconds=600)
    await run.publish("x")
    monkeypatch.setattr(
        "tg_tinker.server.weights.shelf.Stored.expired", property(lambda stored: stored.expires_at is not None)
    )
    assert await run.tokens([1, 2]) == ["SAMPLER_VERSION_NOT_FOUND", 13]
