from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from fixtures.fake_engine import MODEL
from fixtures.server_client import Client

from tg_tinker.errors import InvalidRequestError
from tg_tinker.server import limits
from tg_tinker.server.auth import PUBLIC, new_key
from tg_tinker.server.middleware import ROOMS

PUBLIC_ON_PURPOSE = {"/healthz", "/readyz", "/v1/health", "/api/v1/health", "/v1/loops/files/{token}/{name}"}


def routes(client: Client) -> list[tuple[str, str]]:
    """Every route of the application."""
    resources = client.server.app.router.resources()
    return [(route.method, resource.canonical) for resource in resources for route in resource]


async def test_every_route_needs_a_key_but_those_listed(client):
    """No route answers a request without a key, nor one with a wrong key, except the five that are public."""
    assert len(routes(client)) > 40
    assert PUBLIC == PUBLIC_ON_PURPOSE
    for method, path in routes(client):
        concrete = path.replace("{", "").replace("}", "")
        for key in (None, "wrong"):
            answer = await client.as_tenant(key).call(method, concrete)
            if path in PUBLIC_ON_PURPOSE:
                assert answer.status != 401, path
            elif method != "HEAD":
                assert (answer.status, answer.error["code"]) == (401, "AUTHENTICATION_REQUIRED"), path


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Api-Key", "api-key"])
async def test_both_schemes_are_taken(client, scheme):
    """A key may come as Bearer or as Api-Key."""
    answer = await client.as_tenant(None).get("/v1/training_clients", Authorization=f"{scheme} test-key")
    assert answer.status == 200


async def test_keys_of_the_database_expire_and_can_be_revoked(serve, monkeypatch):
    """A stored key opens the server until it expires or is revoked; another's secret with its id does not."""
    monkeypatch.setattr("tg_tinker.server.auth._REMEMBERED", 0.0)
    client = await serve(keys={})
    database = client.server.app[ROOMS].database
    now = datetime.now(UTC)
    await database.add_tenant("acme", now)
    good, row = new_key("acme", name="laptop")
    old, old_row = new_key("acme", expires_at=now - timedelta(seconds=1))
    await database.add_api_key(row)
    await database.add_api_key(old_row)

    async def status(key: str | None) -> int:
        return (await client.as_tenant(key).get("/v1/training_clients")).status

    forged = good[: -len("abc")] + "abc"
    assert [await status(key) for key in (good, old, forged, None)] == [200, 401, 401, 401]
    created = (await client.as_tenant(good).post("/v1/training_clients", {"model_ref": MODEL})).json
    assert created["tenant_id"] == "acme"
    await database.revoke_api_key(row.key_id, datetime.now(UTC))
    assert await status(good) == 401


async def test_without_any_key_loopback_is_open_and_other_addresses_are_refused(serve):
    """A server without keys serves its own machine as one tenant; it refuses to start on another address."""
    client = await serve(keys={})
    assert (await client.as_tenant(None).get("/v1/training_clients")).status == 200
    with pytest.raises(InvalidRequestError, match="tg-tinker keys create"):
        await serve(keys={}, host="0.0.0.0")


async def test_the_end_of_the_last_key_opens_nothing_to_other_machines(serve, monkeypatch):
    """A server that others can reach goes on asking for a key when its only one is revoked."""
    monkeypatch.setattr("tg_tinker.server.auth._REMEMBERED", 0.0)
    database = (await serve(keys={})).server.app[ROOMS].database
    await database.add_tenant("acme", datetime.now(UTC))
    _, row = new_key("acme")
    await database.add_api_key(row)
    client = (await serve(keys={}, host="0.0.0.0")).as_tenant(None)
    await database.revoke_api_key(row.key_id, datetime.now(UTC))
    assert (await client.get("/v1/training_clients")).status == 401


async def test_a_home_that_had_a_key_stays_closed(serve, monkeypatch):
    """A loopback server without keys opens to nobody again once a key was made: not by its end, not by a restart."""
    monkeypatch.setattr("tg_tinker.server.auth._REMEMBERED", 0.0)
    client = (await serve(keys={})).as_tenant(None)
    assert (await client.get("/v1/training_clients")).status == 200
    database = client.server.app[ROOMS].database
    await database.add_tenant("acme", datetime.now(UTC))
    _, row = new_key("acme", expires_at=datetime.now(UTC) + timedelta(days=1))
    await database.add_api_key(row)
    assert (await client.get("/v1/training_clients")).status == 401
    await database.revoke_api_key(row.key_id, datetime.now(UTC))
    assert (await client.get("/v1/training_clients")).status == 401
    later = (await serve(keys={})).as_tenant(None)
    assert (await later.get("/v1/training_clients")).status == 401
    with pytest.raises(InvalidRequestError, match="keys create"):
        await serve(keys={}, host="0.0.0.0")


async def test_a_key_can_be_asked_for_before_there_is_one(serve):
    """With ``require_key`` nobody comes in without a key, although none was made yet."""
    client = await serve(keys={}, require_key=True)
    assert (await client.as_tenant(None).get("/v1/training_clients")).status == 401


async def test_a_foreign_id_is_as_good_as_none(client):
    """Another tenant's run, future and artifact answer 404, exactly like ids that never existed."""
    run = await client.create(MODEL)
    future = await client.submit(f"{run}/save_state")
    artifact = (await client.result(future))["result"]["artifact_id"]
    other = client.as_tenant("other-key")
    for path in (run, future, f"{future}/result", f"/v1/artifacts/{artifact}/content", f"{run}/privacy"):
        foreign = await other.get(path)
        assert foreign.status == 404, path
        assert foreign.error["code"].endswith("_NOT_FOUND")
        assert (await client.get(path)).status == 200, path
    assert (await other.post(f"{run}/optim_step")).status == 404
    assert (await other.get("/v1/training_clients")).json == []
    assert (await other.get("/v1/futures")).json == []


async def test_a_rebound_name_is_refused(client):
    """A Host header with any other name gets 403: no web page can reach the server under its own name."""
    assert (await client.get("/healthz", Host="evil.example")).status == 403
    assert (await client.get("/healthz", Host="localhost:1")).status == 200


async def test_a_server_answers_under_its_own_address(serve):
    """Whatever address of this machine a server listens on, requests and pages that name it are served."""
    client = await serve(host="127.0.0.2")
    assert (await client.get("/healthz", Host="127.0.0.2:8000", Origin="http://127.0.0.2:3000")).status == 200
    assert (await client.get("/healthz", Host="127.0.0.3:8000")).status == 403


async def test_a_page_of_another_site_is_refused(serve):
    """An Origin elsewhere gets 403, also where no key is asked for: a web page cannot train here by posting."""
    client = (await serve(keys={})).as_tenant(None)
    body = {"model_ref": MODEL}
    assert (await client.post("/v1/training_clients", body, Origin="https://evil.example")).status == 403
    assert (await client.post("/v1/training_clients", body, Origin="null")).status == 403
    assert (await client.post("/v1/training_clients", body, Origin="http://localhost:3000")).status == 201


async def test_a_picture_on_a_page_of_another_site_loads_no_model(serve, engine):
    """What a page elsewhere embeds or links to has no Origin; the browser's own word for it is enough for a 403."""
    client = (await serve(keys={})).as_tenant(None)
    path = f"/v1/tokenizer?model={MODEL}"
    assert (await client.get(path, Sec_Fetch_Site="cross-site")).status == 403
    assert engine.loads == 0
    for site in ("same-site", "same-origin", "none"):
        assert (await client.get(path, Sec_Fetch_Site=site)).status == 200
    assert (await client.get(path, Sec_Fetch_Site="cross-site", Origin="http://localhost:3000")).status == 200
    with_keys = await serve()  # which no page can send along with a picture
    assert (await with_keys.get(path, Sec_Fetch_Site="cross-site")).status == 200


async def test_too_many_requests_are_told_when_to_come_back(serve, monkeypatch):
    """Over the limit a tenant gets 429 with Retry-After; another tenant is not affected."""
    monkeypatch.setattr(limits, "monotonic", lambda: 100.0)  # however long the requests take
    client = await serve(requests_per_minute=14)
    *good, refused = [await client.get("/v1/training_clients") for _ in range(15)]
    assert {answer.status for answer in good} == {200}
    assert (refused.status, refused.error["code"]) == (429, "RATE_LIMITED")
    assert int(refused.headers["Retry-After"]) >= refused.error["details"]["retry_after"] > 0  # never told too early
    assert (await client.as_tenant("other-key").get("/v1/training_clients")).status == 200


async def test_too_many_samples_are_told_when_to_come_back(serve, engine):
    """With as many samples under way as a tenant may have, the next gets 429 with Retry-After; another's does not."""
    client = await serve(queue_limit=1)
    _, sampler = await client.trainer(MODEL)
    other = client.as_tenant("other-key")
    _, free = await other.trainer(MODEL)
    engine.tick_gate.clear()
    body = {"prompt": [1], "max_tokens": 1}
    tasks = [asyncio.create_task(client.post(f"{sampler}/sample", body))]
    async with asyncio.timeout(30):
        while not client.server.app[ROOMS].sampling._inside["tenant-a"]:
            await asyncio.sleep(0.005)
        answer = await client.post(f"{sampler}/sample", body)
    assert (answer.status, answer.error["code"]) == (429, "QUEUE_FULL")
    assert int(answer.headers["Retry-After"]) >= 1
    tasks.append(asyncio.create_task(other.post(f"{free}/sample", body)))
    engine.tick_gate.set()
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200, 200]
