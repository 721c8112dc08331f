"""Base models in memory: held by the runs and samplers on them, and gone after those."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from fixtures.fake_engine import MODEL, FakeEngine
from fixtures.server_client import BATCH, Client

from tg_tinker.server.engine import TorchEngine
from tg_tinker.server.middleware import ROOMS
from tg_tinker.server.rooms import Rooms
from tg_tinker.server.sweeping import Sweeping
from tg_tinker.server.weights.models import Model

TINY = "tg-tinker/tiny"


def rooms_of(client: Client) -> Rooms:
    """What the server is made of."""
    return client.server.app[ROOMS]


async def samplers(rooms: Rooms) -> int:
    """How many engine's samplers take turns on the device thread, once it has done what it was asked."""
    return await rooms.scheduler.call(lambda: len(rooms.scheduler._samplers))


async def delete(client: Client, run: str) -> None:
    """Delete a TG run."""
    assert (await client.call("DELETE", run)).status in {200, 204}


class WatchingEngine(FakeEngine):
    """Notes which of some models are still in memory when the next one is about to be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[weakref.ref[Any]] = []
        self.left: list[Any] = []

    def load(self, *arguments: Any) -> Any:
        gc.collect()
        self.left = [part() for part in self.watched if part() is not None]
        return super().load(*arguments)


async def test_an_unused_model_goes_before_another_is_loaded(serve):
    """A model whose last run has ended leaves memory, and its sampler the device thread, to make room for the next."""
    engine = WatchingEngine()
    client = await serve(engine=engine)
    rooms = rooms_of(client)
    run = await client.create(MODEL)
    await client.run(f"{run}/sample", {"prompts": "a", "max_tokens": 3})
    engine.watched = [weakref.ref(part) for model in rooms.models.loaded() for part in (model, model.sampler)]
    engine.samplers.clear()
    await delete(client, run)
    assert (len(rooms.models.loaded()), await samplers(rooms)) == (1, 1)
    other = await client.create(MODEL, mixed_precision="bf16")
    assert (len(engine.watched), engine.left, await samplers(rooms)) == (2, [], 1)
    assert (await client.run(f"{other}/sample", {"prompts": "a", "max_tokens": 3}))["status"] == "completed"


async def test_a_model_in_use_stays(client, engine):
    """Whatever else is loaded and however long it takes, a model stays with its runs and with samplers in use."""
    rooms = rooms_of(client)
    run = await client.create(MODEL)
    made = (await client.post("/v1/loops/samplers", {"base_model": MODEL})).json["sampler"]
    await delete(client, await client.create(MODEL, mixed_precision="bf16"))
    await Sweeping(rooms).sweep()
    gc.collect()
    assert len(rooms.models.loaded()) == 2
    await delete(client, run)
    await client.create(MODEL, mixed_precision="bf16")
    body = {"prompt": [1], "max_tokens": 1}
    assert (await client.post(f"/loops/samplers/{made['id']}/sample", body)).status == 200
    assert engine.loads == 2


async def test_an_idle_sampler_lets_go_and_comes_back(serve, engine):
    """A sampler that nobody used for ``idle`` seconds holds no model; its next sample loads the model again."""
    client = await serve(idle=0.0)
    rooms = rooms_of(client)
    made = (await client.post("/v1/loops/samplers", {"base_model": MODEL})).json["sampler"]
    body, url = {"prompt": [1], "max_tokens": 1}, f"/loops/samplers/{made['id']}/sample"
    for loads in (1, 2):
        assert (await client.post(url, body)).status == 200
        assert engine.loads == loads
        await Sweeping(rooms).sweep()
        gc.collect()
        assert (rooms.models.loaded(), await samplers(rooms)) == ([], 0)


async def test_a_sampler_without_a_run_is_made_once(client, monkeypatch):
    """Asked again for a model or a checkpoint a tenant gets the same sampler; the number of them is bounded."""
    trainer, _ = await client.trainer(MODEL)
    path = (await client.operate(trainer, "save_weights_for_sampler", {"name": "p"}))["result"]["path"]

    async def made(by: Client, **body: str) -> str:
        return str((await by.post("/v1/loops/samplers", body)).json["sampler"]["id"])

    base = [await made(client, base_model=MODEL) for _ in range(3)]
    pinned = [await made(client, model_path=path) for _ in range(3)]
    assert [len(set(ids)) for ids in (base, pinned, base + pinned)] == [1, 1, 2]
    assert await made(client.as_tenant("other-key"), base_model=MODEL) not in base
    monkeypatch.setattr("tg_tinker.server.serving.samplers.MOST", 3)
    await client.operate(trainer, "save_weights_for_sampler", {"name": "q"})
    await made(client, base_model=MODEL)
    await made(client, model_path=path.replace("/p", "/q"))
    forgotten = await client.post(f"/loops/samplers/{pinned[0]}/sample", {"prompt": [1], "max_tokens": 1})
    assert forgotten.error["code"] == "SAMPLER_NOT_FOUND"
    assert await made(client, base_model=MODEL) == base[0]


async def test_a_client_that_left_while_its_model_loaded_finds_it(client, engine):
    """A model whose loading nobody waits for any more is there for whoever asks next."""
    rooms = rooms_of(client)
    engine.load_gate.clear()
    task = rooms.models._start((MODEL, "auto"))
    engine.load_gate.set()
    await task
    del task
    gc.collect()
    await rooms.models.get(MODEL)
    assert engine.loads == 1


@pytest.mark.timeout(240)
async def test_the_real_engine_leaves_nothing_behind(serve, tmp_path):
    """A model that was trained, published from, sampled from and unloaded is no longer in memory."""
    client = await serve(engine=TorchEngine(home=tmp_path, threads=1))
    run = await client.create(TINY)
    for operation, body in (("forward_backward", {"batch": BATCH}), ("optim_step", {}), ("save_state", {})):
        assert (await client.run(f"{run}/{operation}", body))["status"] == "completed"
    await client.run(f"{run}/sample", {"prompts": "abc", "max_tokens": 3})
    (model,) = rooms_of(client).models.loaded()
    parts: tuple[Any, ...] = (model, model.base, model.base.model, model.sampler)
    gone = [weakref.ref(part) for part in parts if hasattr(part, "__weakref__")]
    del model, parts
    assert len(gone) >= 3
    await delete(client, run)
    await client.create(TINY, mixed_precision="bf16")
    gc.collect()
    assert [part() for part in gone] == [None] * len(gone)


async def test_a_text_is_encoded_alone_even_when_who_asked_has_left():
    """The tokenizer stays taken until its thread has ended, though nobody waits for that text any more."""
    begun, go_on, inside, most = threading.Event(), threading.Event(), 0, 0

    def encode(text: str) -> list[int]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        begun.set()
        if text != "short":
            assert go_on.wait(20)
        inside -= 1
        return [1]

    model = Model("fake", SimpleNamespace(tokenizer=SimpleNamespace(encode=encode)), None)  # type: ignore[arg-type]
    left = asyncio.create_task(model.encode("long" * 10_000))
    assert await asyncio.to_thread(begun.wait, 20)
    left.cancel()
    next_one = asyncio.create_task(model.encode("short"))
    await asyncio.wait([left])
    go_on.set()
    assert await next_one == (1,)
    assert most == 1
