"""What belongs to one tenant is, for another, what never existed: by every route of the router, and in every body."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from fixtures.fake_engine import MODEL
from fixtures.server_client import OTHER_KEY, Answer, Client, datum

from tg_tinker.server.auth import PUBLIC


@attrs.frozen
class Owned:
    """The ids of one of each kind of thing, all of one tenant."""

    run: str
    future: str
    artifact: str
    trainer: str
    operation: str
    sampler: str
    checkpoint: str
    weights: str
    state: str

    @classmethod
    async def make(cls, client: Client) -> Owned:
        """Make them."""
        run = await client.create(MODEL)
        future = await client.submit(f"{run}/save_state")
        artifact = (await client.result(future))["result"]["artifact_id"]
        trainer, sampler = await client.trainer(MODEL)
        await client.operate(trainer, "forward_backward", {"data": [datum(1, 2)]}, "passed")
        weights = await client.operate(trainer, "save_weights_for_sampler", {"name": "w"})
        state = await client.operate(trainer, "save_state", {"name": "s"})
        name = trainer.rpartition("/")[2]
        checkpoint = (await client.get(f"/v1/loops/checkpoints?run_id={name}")).json["checkpoints"][0]["id"]
        return cls(
            run=_id(run), future=_id(future), artifact=artifact, trainer=name, operation="passed",
            sampler=_id(sampler), checkpoint=checkpoint,
            weights=weights["result"]["path"], state=state["result"]["path"],
        )  # fmt: skip

    def path(self, route: str) -> str:
        """A route filled in; ``KeyError`` for a route that this test does not know."""
        base = route.removeprefix("/api").partition("{")[0]
        named = {
            "/v1/training_clients/": {"id": self.run},
            "/v1/futures/": {"id": self.future},
            "/v1/artifacts/": {"id": self.artifact},
            "/loops/trainers/": {"run": self.trainer, "id": self.operation},
            "/loops/samplers/": {"sampler": self.sampler},
            "/v1/loops/runs/": {"id": self.trainer},
            "/v1/loops/deployments/": {"id": f"dep-{self.trainer}"},
            "/v1/models/": {"model": f"mdl-{self.sampler}", "id": f"dep-{self.sampler}"},
            "/v1/loops/checkpoints/": {"id": self.checkpoint},
        }[base]
        return route.format(**named)


def _id(path: str) -> str:
    return path.rpartition("/")[2]


NOBODYS = Owned(
    run="tc-00000000-0000-4000-8000-000000000000", future="fut-00000000-0000-4000-8000-000000000000",
    artifact=f"art-{'0' * 32}", trainer=f"run-{'0' * 32}", operation="never", sampler="smp-0",
    checkpoint=f"art-{'1' * 32}",
    weights=f"bt://loops:run-{'0' * 32}/sampler_weights/w", state=f"bt://loops:run-{'0' * 32}/weights/s",
)  # fmt: skip


def told(answer: Answer, owned: Owned) -> tuple[int, Any, set[str]]:
    """All that an answer tells, but for the ids that were asked for."""
    text = answer.body.decode().replace(answer.headers["X-Request-Id"], "REQUEST")
    for value in sorted(attrs.asdict(owned).values(), key=len, reverse=True):
        text = text.replace(value, "ID")
    return answer.status, json.loads(text), set(answer.headers)


async def test_no_route_tells_a_foreign_id_from_one_that_never_was(client):
    """Every route with an id in its path refuses a foreign one exactly as a made-up one, and changes nothing."""
    owned, other = await Owned.make(client), client.as_tenant(OTHER_KEY)
    await other.create(MODEL)  # a tenant that is known, and whose answers bring a head of its log
    routes = [
        (route.method, resource.canonical)
        for resource in client.server.app.router.resources()
        for route in resource
        if "{" in resource.canonical and resource.canonical not in PUBLIC and route.method != "HEAD"
    ]
    assert len(routes) > 50
    for method, route in routes:
        asked = [(await other.call(method, one.path(route), {}), one) for one in (owned, NOBODYS)]
        foreign, unknown = [told(answer, one) for answer, one in asked]
        assert foreign == unknown, (method, route)
        assert foreign[0] == (422 if method == "POST" and route.startswith("/loops/") else 404), (method, route)
    for method, route in routes:
        if method == "GET":
            assert (await client.get(owned.path(route))).status == 200, route


IN_BODIES = {
    "a new run": ("/v1/training_clients", {"model_ref": MODEL, "checkpoint_id": "{artifact}"}),
    "a run": ("/v1/training_clients/MINE/load_state", {"artifact_id": "{artifact}"}),
    "a new trainer": ("/v1/loops/trainers", {"base_model": MODEL, "lora_rank": 4, "path": "{state}"}),
    "a sampler of a run": ("/v1/loops/samplers", {"run_id": "{trainer}"}),
    "a sampler of weights": ("/v1/loops/samplers", {"model_path": "{weights}"}),
    "a validation": ("/v1/loops/checkpoints/validate", {"checkpoint_path": "{weights}"}),
}


@pytest.mark.parametrize(("path", "body"), IN_BODIES.values(), ids=IN_BODIES)
async def test_no_body_tells_a_foreign_id_from_one_that_never_was(client, path, body):
    """An artifact, a run or a checkpoint that a body names is not found either."""
    owned, other = await Owned.make(client), client.as_tenant(OTHER_KEY)
    path = path.replace("MINE", _id(await other.create(MODEL)))
    answers = []
    for one in (owned, NOBODYS):
        filled = {
            name: value.format(**attrs.asdict(one)) if isinstance(value, str) else value for name, value in body.items()
        }
        answers.append(told(await other.post(path, filled), one))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404


async def test_no_operation_and_no_sample_takes_a_foreign_checkpoint(client):
    """A trainer that loads another's state, and a sample that asks for its weights, fail as if there were none."""
    owned, other = await Owned.make(client), client.as_tenant(OTHER_KEY)
    trainer, sampler = await other.trainer(MODEL)
    for name in ("load_state", "load_state_with_optimizer"):
        assert (await other.operate(trainer, name, {"path": owned.state}))["code"] == "CHECKPOINT_NOT_FOUND"
    sampled = await other.post(f"{sampler}/sample", {"prompt": [1]}, X_Checkpoint_Path=owned.weights)
    assert sampled.error["code"] == "CHECKPOINT_NOT_FOUND"


@pytest.mark.parametrize(
    "query",
    ["/v1/futures?training_client_id={run}", "/v1/artifacts?training_client_id={run}",
     "/v1/audit_logs?training_client_id={run}", "/v1/loops/checkpoints?run_id={trainer}"],
)  # fmt: skip
async def test_no_list_has_what_is_anothers(client, query):
    """A list that is asked for a foreign run is empty, and the owner's is not."""
    owned = await Owned.make(client)
    path = query.format(**attrs.asdict(owned))
    for who, empty in ((client, False), (client.as_tenant(OTHER_KEY), True)):
        found = (await who.get(path)).json
        assert (not (found["checkpoints"] if isinstance(found, dict) else found)) is empty
