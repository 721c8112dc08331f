"""Which tenant a client works for: told by every answer, and refused where it is not the one that was asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from fixtures.fake_engine import MODEL
from fixtures.server_client import KEY, OTHER_KEY

from tg_tinker import AuthorizationError, ServiceClient, TrainingConfig


@pytest.fixture
async def connect(client) -> AsyncIterator[Callable[..., ServiceClient]]:
    """Make clients of the server on this loop."""
    made: list[ServiceClient] = []

    async def connect(key: str, **options) -> ServiceClient:
        service = await ServiceClient(key, str(client.server.make_url("")).rstrip("/"), **options).__aenter__()
        made.append(service)
        return service

    yield connect
    for service in made:
        await service.aclose()


async def test_every_answer_tells_the_tenant(connect):
    """On the Loops surface as on the other, a client knows its tenant from the first answer on."""
    first, second = await connect(KEY), await connect(OTHER_KEY)
    assert first.tenant_id is None
    await first.create_lora_training_client_async(MODEL, 4)
    await second.create_training_client_async(TrainingConfig(model_ref=MODEL))
    assert (first.tenant_id, second.tenant_id) == ("tenant-a", "tenant-b")


async def test_another_tenant_than_asked_for_is_refused_on_either_surface(connect):
    """A key of one tenant with the name of another: an AuthorizationError that names both, whatever is called first."""
    for call in (
        lambda service: service.create_lora_training_client_async(MODEL, 4),
        lambda service: service.create_training_client_async(TrainingConfig(model_ref=MODEL)),
        lambda service: service.list_training_clients_async(),
    ):
        service = await connect(KEY, tenant_id="tenant-b")
        with pytest.raises(AuthorizationError, match="belongs to tenant 'tenant-a', not to tenant_id='tenant-b'"):
            await call(service)


async def test_public_answers_name_no_tenant(client):
    """Who shows no key learns of no tenant."""
    answer = await client.as_tenant(None).get("/healthz")
    assert "X-TG-Tenant" not in answer.headers
    assert (await client.get("/v1/training_clients")).headers["X-TG-Tenant"] == "tenant-a"
