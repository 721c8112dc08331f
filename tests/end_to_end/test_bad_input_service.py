"""Every entry of the service refuses what it cannot use; so do closed clients, absent servers and wrong keys."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from fixtures.programs import BATCH, MODEL, tg_config

from tg_tinker import (
    AdamParams,
    AuthenticationError,
    BatchData,
    ClientClosedError,
    InvalidRequestError,
    ResourceNotFoundError,
    SamplingParams,
    ServerUnreachableError,
    ServiceClient,
    TensorData,
    TrainingConfig,
)
from tg_tinker.embedded import server_of

pytestmark = pytest.mark.timeout(240)

EAST, WEST = timezone(timedelta(hours=3)), timezone(timedelta(hours=-3))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda service: service.create_training_client(None), "config"),
        (lambda service: service.create_training_client({}), "model_ref"),
        (lambda service: service.create_training_client({"model_ref": MODEL, "lora": {}}), "lora"),
        (lambda service: service.create_training_client({"model_ref": MODEL}, 5), "checkpoint_id"),
        (lambda service: service.create_training_client(tg_config(mixed_precision="fp16")), "mixed_precision"),
        (lambda service: service.create_training_client(tg_config(lora_config={"bias": "all"})), "lora_config.bias"),
        (lambda service: service.create_training_client(tg_config(lora_config={"target_modules": ["nope"]})), None),
        (lambda service: service.get_training_client(None), "training_client_id"),
        (lambda service: service.list_training_clients("ready"), "status"),
        (lambda service: service.list_training_clients(limit=0), "limit"),
        (lambda service: service.delete_training_client(""), "training_client_id"),
        (lambda service: service.get_future(3), "future_id"),
        (lambda service: service.pull_artifact(None), "artifact_id"),
        (lambda service: service.get_audit_logs(start_time="now"), "start_time"),
        (lambda service: service.get_audit_logs(start_time=datetime.min.replace(tzinfo=EAST)), "start_time"),
        (lambda service: service.get_audit_logs(end_time=datetime.max.replace(tzinfo=WEST)), "end_time"),
        (lambda service: service.get_audit_logs(limit=-1), "limit"),
        (lambda service: service.create_lora_training_client(""), "base_model"),
        (lambda service: service.create_lora_training_client(MODEL, 0), "rank"),
        (lambda service: service.create_lora_training_client(MODEL, replicas=2), "replicas"),
        (lambda service: service.create_lora_training_client(MODEL, seed=-1), "seed"),
        (lambda service: service.create_lora_training_client(MODEL, max_seq_len=0), "max_seq_len"),
        (lambda service: service.create_lora_training_client(MODEL, dp_config=8.0), "dp_config"),
        (lambda service: service.create_lora_training_client(MODEL, dp_config={"sigma": 1.0}), "dp_config.sigma"),
        (lambda service: service.create_training_client_from_state("x"), "path"),
        (lambda service: service.create_training_client_from_state("bt://loops:r/weights/n", "m"), "user_metadata"),
        (lambda service: service.attach(None), "run_id"),
        (lambda service: service.deactivate_run(""), "run_id"),
        (lambda service: service.create_sampling_client(), "base_model"),
        (lambda service: service.create_sampling_client(MODEL, model_path="x"), "base_model"),
        (lambda service: service.create_sampling_client(model_path="x"), "model_path"),
        (lambda service: service.create_sampling_client(model_path="bt://loops:r/weights/n"), "model_path"),
        (lambda service: service.list_checkpoints(None), "run_id"),
        (lambda service: service.get_checkpoint_archive_url(), "checkpoint_id"),
        (lambda service: service.get_checkpoint_archive_url(name="a"), "run_id"),
        (lambda service: service.get_checkpoint_archive_url("a", target="both"), "target"),
    ],
)
def test_wrong_arguments_of_the_service(service: ServiceClient, call: Callable[[Any], Any], field: str | None) -> None:
    """Every creator, getter and lister checks its arguments, by name."""
    with pytest.raises(InvalidRequestError) as caught:
        call(service)
    assert field is None or caught.value.field == field


@pytest.mark.parametrize(
    "call",
    [
        lambda service: service.create_training_client(TrainingConfig(model_ref="tg-tinker/nowhere")),
        lambda service: service.create_training_client(TrainingConfig(model_ref="./no/such/folder")),
        lambda service: service.create_training_client(tg_config(), "art-nowhere"),
        lambda service: service.create_lora_training_client("tg-tinker/nowhere"),
        lambda service: service.create_sampling_client("tg-tinker/nowhere"),
        lambda service: service.create_sampling_client(model_path="bt://loops:run-x/sampler_weights/y"),
        lambda service: service.create_training_client_from_state("bt://loops:run-x/weights/y"),
        lambda service: service.get_training_client("tc-nowhere"),
        lambda service: service.get_training_client("../futures"),
        lambda service: service.delete_training_client("tc-nowhere"),
        lambda service: service.get_future("fut-nowhere"),
        lambda service: service.pull_artifact("art-nowhere"),
        lambda service: service.attach("run-nowhere"),
        lambda service: service.deactivate_run("run-nowhere"),
        lambda service: service.get_checkpoint_archive_url("nowhere"),
    ],
)
def test_what_does_not_exist(service: ServiceClient, call: Callable[[Any], Any]) -> None:
    """Unknown models, runs, futures, artifacts and checkpoints are not found, and never made up."""
    with pytest.raises(ResourceNotFoundError):
        call(service)


def test_an_argument_that_nobody_knows_is_refused(service: ServiceClient) -> None:
    """An unknown keyword of a creator is refused as Python refuses it, with the nearest name: none is dropped."""
    with pytest.raises(TypeError, match=r"lora_rank.*did you mean .rank"):
        service.create_lora_training_client(MODEL, lora_rank=8)  # type: ignore[call-arg]


def test_a_closed_client_says_so(home: Path, service: ServiceClient) -> None:
    """After ``close`` every client of the service refuses to work; closing again does nothing."""
    with ServiceClient(home=home) as client:
        run = client.create_training_client(tg_config())
        trainer = client.create_lora_training_client(MODEL, 2)
        sampler = client.create_sampling_client(MODEL)
        trainer.close()
        with pytest.raises(ClientClosedError):
            trainer.health()
        assert run.refresh().status == "active"
    client.close()
    for call in (
        lambda: run.forward_backward(BATCH),
        lambda: run.sample("a"),
        lambda: run.sample_stream("a"),
        run.get_tokenizer,
        lambda: sampler.sample([1]),
        lambda: client.create_training_client(tg_config()),
        client.get_server_capabilities,
    ):
        with pytest.raises(ClientClosedError):
            call()
    with pytest.raises(ClientClosedError), client:
        client.get_server_capabilities()
    assert service.get_server_capabilities()


def test_a_server_that_is_not_there() -> None:
    """A refused connection is a typed error, also a ConnectionError, with the URL, once the retries are over."""
    began = time.monotonic()
    with ServiceClient("http://127.0.0.1:9", "key", retry_count=1) as client:
        with pytest.raises(ServerUnreachableError) as caught:
            client.create_training_client(tg_config())
        assert isinstance(caught.value, ConnectionError)
        assert "127.0.0.1:9" in str(caught.value.url)
    assert time.monotonic() - began < 30.0


@pytest.mark.parametrize("key", ["wrong-key", None])
def test_a_wrong_key(service: ServiceClient, home: Path, key: str | None) -> None:
    """A key that the server does not know, and none at all, are refused; the key is in no message."""
    process = server_of(home).process
    assert process is not None
    with ServiceClient(key, process.url) as client, pytest.raises(AuthenticationError) as caught:
        client.create_training_client(tg_config())
    assert "wrong-key" not in str(caught.value)


def test_values_check_themselves() -> None:
    """Batches, datums and parameters are wrong when they are made, not when they are sent."""
    for make in (
        lambda: BatchData([[1], [1, 2]]),
        lambda: AdamParams(learning_rate=math.nan),
        lambda: SamplingParams(max_tokens=-1),
        lambda: TensorData([1.0, 2.0], "float32", [3]),
        lambda: TrainingConfig(model_ref=MODEL, batch_size=0),
    ):
        with pytest.raises(InvalidRequestError):
            make()


def test_an_error_says_where_the_call_was_made(service: ServiceClient) -> None:
    """The note of an error names the operation and the caller's own line, also where several requests were made."""
    with pytest.raises(ResourceNotFoundError) as caught:
        service.attach("run-nowhere")
    assert any("test_bad_input_service.py" in note for note in caught.value.__notes__)
