"""Recorded requests of the published Loops client, replayed against this server with the real engine and tiny model.

The transcripts are what baseten-loops 0.32.0 and 0.7.1 sent, and the shapes that they understand. Only names differ:
the model, and the ids that this server gives out.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fixtures import fake_engine
from fixtures.fake_engine import MODEL
from fixtures.server_client import KEY, Answer, Client, datum

from tg_tinker.server.engine import TorchEngine
from tg_tinker.server.middleware import ROOMS
from tg_tinker.server.sweeping import Sweeping

TINY = "tg-tinker/tiny"
TRANSCRIPTS = Path(__file__).parents[1] / "fixtures" / "transcripts"
SAMPLER_ROUTES = ("/sample", "/trainers_policy_version", "/v1/models?", "/wake")
CONTROL_ROUTES = ("/v1/loops/", "/v1/models/", "/v1/teams")
#: what a response must say exactly, names apart; of everything else the shape counts
SAID = {"operation_id", "schema_version", "status", "lora_rank", "path", "mode", "kind", "object"}
#: why a sample may end: which it is, the draw decides
ENDS = {"length", "stop"}
LEARNT = {"id", "session_id", "deployment_id", "model_id"}
#: statuses of a submit that the client takes for a cold start, and tries again for up to an hour
TRIED_AGAIN = {400, 404, 408, 502, 503}


class Published:
    """The published client as its transcripts show it: its requests, and what it reads of the answers."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.names = {"Qwen/Qwen3-8B": TINY, "Qwen%2FQwen3-8B": TINY.replace("/", "%2F")}
        self.trainer = self.sampler = ""

    async def open(self, run_name: str) -> None:
        """Make the run that a transcript without a control plane speaks to."""
        self.trainer, self.sampler = await self.client.trainer(TINY)
        self.names[run_name] = self.trainer.rpartition("/")[2]

    async def replay(self, name: str) -> None:
        """Send every request of a transcript, and check every answer."""
        exchanges = json.loads((TRANSCRIPTS / f"{name}.json").read_text(encoding="utf-8"))
        for recorded in exchanges:
            await self.exchange(recorded)

    async def exchange(self, recorded: dict[str, Any]) -> None:
        """Send one request, and check its answer; an accepted operation is waited for, as the client does."""
        said = {"Authorization": f"Api-Key {KEY}", **self.ours(recorded["headers"])}
        path = self.place(self.ours(recorded["path"]))
        answer = await self.client.call(recorded["method"], path, self.ours(recorded.get("body")), **said)
        where = f"{recorded['method']} {recorded['path']}"
        assert answer.status == recorded["status"], (where, answer.body)
        self.learn(recorded["response"], answer.json)
        check(self.ours(recorded["response"]), answer.json, where)
        if "x-trainers-policy-version" in recorded.get("response_headers", {}):
            check_version(said, answer)
        if answer.status == 202:
            assert answer.json == {"operation_id": said["Idempotency-Key"], "schema_version": 1}
            outcome = await self.client.get(f"{self.trainer}/operations/{said['Idempotency-Key']}", **said)
            assert (outcome.status, outcome.json["status"]) == (200, "done"), (where, outcome.body)

    def place(self, path: str) -> str:
        """The path below the base url that this server handed out for its kind of request."""
        if path.startswith(CONTROL_ROUTES):
            return path
        return (self.sampler if f"{path}?".startswith(SAMPLER_ROUTES) else self.trainer) + path

    def ours(self, value: Any) -> Any:
        """A recorded value, with our names in place of those recorded."""
        if isinstance(value, dict):
            return {key: self.ours(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.ours(one) for one in value]
        if isinstance(value, str):
            for name in sorted(self.names, key=len, reverse=True):
                value = value.replace(name, self.names[name])
        return value

    def learn(self, recorded: dict[str, Any], answered: dict[str, Any]) -> None:
        """Take the names that the control plane gives out, as the client does."""
        for kind in ("session", "run", "sampler"):
            if recorded.get(kind) and answered.get(kind):
                self.note(recorded[kind], answered[kind])
                if kind != "session":
                    setattr(self, kind.replace("run", "trainer"), self.below(answered[kind]["base_url"]))
        if "run" in recorded:  # which may bring its sampler along
            self.learn(recorded["run"], answered["run"])
        if "checkpoints" in recorded:
            self.note(recorded["checkpoints"][0], answered["checkpoints"][-1])

    def note(self, recorded: dict[str, Any], answered: dict[str, Any]) -> None:
        """Match the names of one resource."""
        self.names |= {recorded[key]: answered[key] for key in LEARNT & recorded.keys() if recorded[key]}

    def below(self, url: str) -> str:
        """The path of a url, which must be whole: that client appends to it and sends it as it stands."""
        root = str(self.client.server.make_url("/"))
        assert url.startswith(root)
        return url.removeprefix(root.rstrip("/"))


def check_version(said: dict[str, str], answer: Answer) -> None:
    """The version that sampled is told, and is at least the one that the client insisted on."""
    version = int(answer.headers["x-trainers-policy-version"])
    if "X-Checkpoint-Path" not in said:
        assert version >= int(said.get("X-Min-Policy-Version", "0"))


def check(recorded: Any, answered: Any, where: str) -> None:
    """Every key that was recorded is answered, in its type; numbers are finite, and nothing turned null."""
    if isinstance(recorded, dict):
        assert isinstance(answered, dict), where
        for key, one in recorded.items():
            assert key in answered, f"{where}.{key}"
            check(one, answered[key], f"{where}.{key}")
            if key == "finish_reason":
                assert answered[key] in ENDS, f"{where}.{key}"
            if key in SAID and isinstance(one, str):
                assert answered[key] == one, f"{where}.{key}"
    elif isinstance(recorded, list):
        assert isinstance(answered, list), where
        assert bool(answered) == bool(recorded), where
        like = recorded if len(recorded) == len(answered) else recorded[:1] * len(answered)
        for number, (one, other) in enumerate(zip(like, answered, strict=True)):
            check(one, other, f"{where}[{number}]")
    elif isinstance(recorded, int | float) and not isinstance(recorded, bool):
        assert isinstance(answered, int | float), where
        assert math.isfinite(answered), where
        assert isinstance(recorded, float) or isinstance(answered, int), where
    elif recorded is not None:
        assert type(answered) is type(recorded), f"{where}: {answered!r}"


@pytest.fixture
async def published(serve, tmp_path: Path) -> Published:
    """The published client before a server with the tiny model."""
    return Published(await serve(engine=TorchEngine(home=tmp_path, threads=1)))


@pytest.mark.parametrize(
    ("transcript", "run_name"),
    [("local_0_32_0", "none"), ("direct_0_32_0", "run1"), ("custom_loss_0_32_0", "run1"), ("direct_0_7_1", "r1")],
)
async def test_the_data_plane_answers_as_recorded(published, transcript, run_name):
    """Passes, steps, checkpoints and samples of clients without a control plane, both generations of bodies."""
    await published.open(run_name)
    await published.replay(transcript)


@pytest.mark.parametrize("transcript", ["service_0_32_0", "service_0_7_1"])
async def test_the_whole_service_answers_as_recorded(published, transcript):
    """Session, trainer, samplers of all kinds, checkpoints and a resumed run, through the ids and urls given out."""
    await published.replay(transcript)


async def test_an_archive_is_fetched_as_that_client_does(published):
    """The urls of a checkpoint's files are whole, and need no key."""
    client = published.client
    await published.open("run1")
    path = (await client.operate(published.trainer, "save_weights_for_sampler", {"name": "p"}))["result"]["path"]
    found = (await client.get(f"/v1/loops/checkpoints?checkpoint_path={path}")).json["checkpoints"]
    listed = (await client.get(f"/v1/loops/checkpoints/{found[0]['id']}/files?page_size=1000&page_token=0")).json
    names = {file["relative_file_name"] for file in listed["presigned_urls"]}
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names
    assert (listed["next_page_token"], listed["total_count"]) == (None, len(names))
    for file in listed["presigned_urls"]:
        got = await client.as_tenant(None).get(published.below(file["url"]))
        assert (got.status, len(got.body)) == (200, file["size_bytes"])


PASS = {"data": [{"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "loss_fn_inputs": {}}]}
REFUSED = [
    ("trainer", "forward_backward", {**PASS, "loss_fn": "gspo"}),
    ("trainer", "forward_backward", {**PASS, "loss_fn": "ppo"}),
    ("trainer", "forward_backward", {"data": []}),
    ("trainer", "forward", {**PASS, "top_k_logprobs": 5}),
    ("trainer", "forward", {"data": [{**PASS["data"][0], "routed_experts_ref": {"uri": "bt://r", "version": 1}}]}),
    ("trainer", "init_trainer_server", {"lora_rank": 0}),
    ("trainer", "optim_step", {"adam_params": {"learning_rate": -1.0}}),
    ("trainer", "save_state", {"name": "../up"}),
    ("trainer", "load_state", {"path": "s3://elsewhere"}),
    ("sampler", "sample", {"prompt": [], "model_input_chunks": [{"type": "image"}], "n": 1}),
    ("sampler", "sample", {"prompt": [1], "n": 0}),
    ("sampler", "sample", {"prompt": [10**9], "n": 1, "max_tokens": 1}),
]


@pytest.mark.parametrize(("base", "route", "body"), REFUSED)
async def test_what_is_wrong_for_good_is_said_at_once(published, base, route, body):
    """A request that can never succeed is not answered with a status that the client tries again for an hour."""
    await published.open("run1")
    answer = await published.client.post(f"{getattr(published, base)}/{route}", body, Idempotency_Key="k")
    assert answer.status not in TRIED_AGAIN
    assert answer.status >= 400
    assert answer.error["message"]


async def test_a_checkpoint_that_is_not_there_is_said_at_once(published):
    """Loading one fails in the operation, sampling from one fails in the request: neither is tried again."""
    client = published.client
    await published.open("run1")
    missing = f"bt://loops:{published.names['run1']}"
    outcome = await client.operate(published.trainer, "load_state", {"path": f"{missing}/weights/none"})
    assert outcome["status"] == "error"
    assert outcome["error"]
    assert outcome["error_class"]
    body = {"prompt": [1], "n": 1, "max_tokens": 1}
    answer = await client.post(f"{published.sampler}/sample", body, X_Checkpoint_Path=f"{missing}/sampler_weights/none")
    assert answer.status not in TRIED_AGAIN
    assert answer.status >= 400


async def test_a_result_is_there_for_an_hour(client):
    """An outcome is given as often as it is asked for, and leaves the disk an hour after it came, not before."""
    rooms = client.server.app[ROOMS]
    trainer, _ = await client.trainer(MODEL)
    first = await client.operate(trainer, "forward", {"data": [datum(1, 2)]}, key="k")
    await rooms.journal.flush()
    for minutes, swept in ((59, False), (61, True)):
        assert (await client.get(f"{trainer}/operations/k")).json == first
        later = datetime.now(UTC) + timedelta(minutes=minutes)
        _, results = await Sweeping(rooms, clock=lambda now=later: now).sweep()
        assert bool(results) is swept


@pytest.mark.parametrize(("ended", "told"), [("length", "length"), ("stop", "stop"), ("eos", "stop")])
async def test_a_sample_ends_in_a_word_that_client_knows(client, monkeypatch, ended, told):
    """The finish reason is "stop" or "length": with any other that client refuses the whole answer."""
    make = fake_engine._generation
    ending = lambda request, tokens: SimpleNamespace(**vars(make(request, tokens)) | {"finish_reason": ended})  # noqa: E731
    monkeypatch.setattr(fake_engine, "_generation", ending)
    _, sampler = await client.trainer(MODEL)
    answer = await client.post(f"{sampler}/sample", {"prompt": [1], "n": 2, "max_tokens": 2})
    assert [choice["finish_reason"] for choice in answer.json["choices"]] == [told, told]


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "dppo"])
async def test_numbers_are_finite(published, loss_fn):
    """Masked inputs that are null, and ratios beyond all measure, give finite numbers: that client takes no others."""
    await published.open("run1")
    inputs = {"target_tokens": [-100, 2, 3], "logprobs": [None, -2000.0, -1e-6], "advantages": [None, 1.0, -1.0]}
    tensors = {
        name: {"data": values, "dtype": "int64" if name == "target_tokens" else "float32", "shape": [3]}
        for name, values in inputs.items()
    }
    body = {"data": [{**PASS["data"][0], "loss_fn_inputs": tensors}], "loss_fn": loss_fn}
    body["data"][0]["model_input"] = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    result = (await published.client.operate(published.trainer, "forward_backward", body))["result"]
    logprobs = result["loss_fn_outputs"][0]["logprobs"]["data"]
    assert all(math.isfinite(value) for value in (result["loss"], *result["metrics"].values(), *logprobs))
    assert logprobs[0] == 0.0
