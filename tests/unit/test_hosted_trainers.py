"""Trainers of another server, as a published control plane hands them out: set up slowly, or never, and kept awake."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator

import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tg_tinker import ServerError, ServiceClient, loops
from tg_tinker.loops import hosted


@attrs.define(eq=False)
class Plane:
    """A control plane and the one trainer that it makes; ``unhealthy`` counts the answers that are still to be bad."""

    unhealthy: int = 0
    deployment: str | None = "DEPLOYING"
    health: int = 0
    beaten: asyncio.Event = attrs.field(factory=asyncio.Event)
    server: TestServer = attrs.field(init=False)

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/loops/sessions", self._session)
        app.router.add_post("/v1/loops/trainers", self._trainer)
        app.router.add_get("/v1/loops/deployments/dep-1", self._deployment)
        app.router.add_get("/trainer/health", self._health)
        app.router.add_post("/trainer/init_trainer_server", self._init)
        app.router.add_get("/trainer/operations/op-1", self._outcome)
        self.server = TestServer(app)
        await self.server.start_server()

    @property
    def url(self) -> str:
        return str(self.server.make_url("")).rstrip("/")

    async def _session(self, _: web.Request) -> web.Response:
        return web.json_response({"session": {"id": "ses-1"}})

    async def _trainer(self, _: web.Request) -> web.Response:
        run = {
            "id": "run-1",
            "session_id": "ses-1",
            "base_model": "some/model",
            "base_url": f"{self.url}/trainer",
            "created_at": "2026-01-01T00:00:00Z",
            "status": {"name": "ACTIVE"},
            "deployment_id": "dep-1",
        }
        return web.json_response({"run": run})

    async def _deployment(self, _: web.Request) -> web.Response:
        if self.deployment is None:
            return web.json_response({}, status=404)
        return web.json_response({"deployment": {"id": "dep-1", "status": {"name": self.deployment}}})

    async def _health(self, _: web.Request) -> web.Response:
        self.health += 1
        if self.health >= 3:
            self.beaten.set()
        self.unhealthy -= 1
        return web.json_response({}, status=503 if self.unhealthy >= 0 else 200)

    async def _init(self, _: web.Request) -> web.Response:
        return web.json_response({"operation_id": "op-1"}, status=202)

    async def _outcome(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "done", "operation_id": "op-1", "result": {"lora_rank": 8}})


@pytest.fixture
async def plane(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plane]:
    """A control plane in this process, asked at a quick pace."""
    monkeypatch.setattr(hosted, "_HEALTH_PAUSE", 0.01)
    monkeypatch.setattr(hosted, "_HEARTBEAT", 0.02)
    plane = Plane()
    await plane.start()
    yield plane
    await plane.server.close()


def client_of(plane: Plane) -> ServiceClient:
    """A client that does not try again by itself, so that every answer is seen."""
    return ServiceClient(base_url=plane.url, api_key="key", retry_count=0)


async def made_on(service: ServiceClient) -> loops.TrainingClient:
    """A run of the one trainer."""
    return await service.create_lora_training_client_async("some/model", rank=8)


@pytest.mark.parametrize("deployment", ["DEPLOYING", None])
async def test_a_trainer_is_waited_for_while_it_is_set_up(plane: Plane, deployment: str | None) -> None:
    """It may answer badly for a while; that nothing is known of its deployment changes nothing."""
    plane.unhealthy, plane.deployment = 3, deployment
    async with client_of(plane) as service:
        made = await made_on(service)
        assert made.run_id == "run-1"
        assert plane.health >= 4


@pytest.mark.parametrize("status", ["FAILED", "STOPPED", "PREEMPTED"])
async def test_a_deployment_that_failed_ends_the_wait(plane: Plane, status: str) -> None:
    """The error comes at once, not after ``ready_timeout``, and names the deployment."""
    plane.unhealthy, plane.deployment = 1000, status
    async with client_of(plane) as service:
        with pytest.raises(ServerError, match=f"dep-1 is {status}") as caught:
            await made_on(service)
    assert caught.value.code == "DEPLOYMENT_FAILED"
    assert caught.value.details == {"deployment_id": "dep-1", "status": status}
    assert plane.health == 1


async def test_a_trainer_is_asked_after_until_its_client_is_closed(plane: Plane) -> None:
    """An idle client sends heartbeats, a closed one none."""
    async with client_of(plane) as service:
        made = await made_on(service)
        await asyncio.wait_for(plane.beaten.wait(), 20)
        assert not made.core.closed
    await asyncio.sleep(0.1)  # for what was under way
    heard = plane.health
    await asyncio.sleep(0.2)
    assert plane.health == heard


async def test_a_client_that_was_dropped_is_not_kept_awake(plane: Plane) -> None:
    """The heartbeat does not keep a client alive: without it there is none."""
    async with client_of(plane) as service:
        made = await made_on(service)
        await asyncio.wait_for(plane.beaten.wait(), 20)
        del made
        await asyncio.sleep(0)
        gc.collect()
        await asyncio.sleep(0.1)
        heard = plane.health
        await asyncio.sleep(0.3)
        assert plane.health == heard


async def test_silence_is_warned_of_once(plane: Plane, caplog: pytest.LogCaptureFixture) -> None:
    """After five heartbeats without an answer a warning names the run; the client goes on asking."""
    async with client_of(plane) as service:
        made = await made_on(service)
        with caplog.at_level(logging.WARNING, "tg_tinker.loops"):
            plane.unhealthy, before = 1000, plane.health
            async with asyncio.timeout(20):
                while plane.health < before + 8:
                    await asyncio.sleep(0.02)
        assert [record.message.split(":")[0] for record in caplog.records] == [
            f"{made.core!r} has not answered 5 heartbeats in a row"
        ]
