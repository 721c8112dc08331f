"""The facts of the pages beside TrainingClient's: ServiceClient, FutureHandle, the configuration, the errors."""

from __future__ import annotations

import inspect
import time
from typing import Any

import attrs
import pytest
from fixtures.programs import BATCH

import tg_tinker
from tg_tinker import (
    AuthenticationError,
    AuthorizationError,
    DPBudgetExceededError,
    FutureCancelledError,
    FutureHandle,
    FutureTimeoutError,
    InvalidRequestError,
    RateLimitedError,
    ResourceNotFoundError,
    ServerError,
    ServiceClient,
    TGTinkerError,
    TrainingClient,
    TrainingConfig,
)

pytestmark = pytest.mark.timeout(240)

REQUIRED = inspect.Parameter.empty
LONG = {"input_ids": [[index % 250 for index in range(1500)]] * 8}  # busy for a while

METHODS: dict[str, dict[str, Any]] = {
    "create_training_client": {"config": REQUIRED, "checkpoint_id": None},
    "get_training_client": {"training_client_id": REQUIRED},
    "list_training_clients": {"status": None, "limit": 100},
    "delete_training_client": {"training_client_id": REQUIRED},
    "get_future": {"future_id": REQUIRED},
    "pull_artifact": {"artifact_id": REQUIRED, "destination": None},
    "get_audit_logs": {
        "training_client_id": None,
        "operation": None,
        "start_time": None,
        "end_time": None,
        "limit": 100,
        "offset": 0,
    },
    "close": {},
}


def positional(method: Any) -> dict[str, Any]:
    """The parameters that may be given by place, and their defaults."""
    parameters = inspect.signature(method).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD and one.name != "self"}


@pytest.mark.parametrize("name", list(METHODS))
def test_the_methods_of_the_service(name: str) -> None:
    """Each takes the page's parameters in the page's order with its defaults, and so does its twin."""
    assert list(positional(getattr(ServiceClient, name)).items()) == list(METHODS[name].items())
    assert positional(getattr(ServiceClient, f"{name}_async")) == METHODS[name]


def test_the_service_is_made_as_on_its_page() -> None:
    """Key and URL come first, by place; tenant, timeout and retries by name, with the page's defaults."""
    assert positional(ServiceClient) == {"api_key": None, "base_url": None}
    named = inspect.signature(ServiceClient).parameters
    assert {name: named[name].default for name in ("tenant_id", "timeout", "retry_count")} == {
        "tenant_id": None,
        "timeout": 300.0,
        "retry_count": 3,
    }
    for name in ("tenant_id", "config"):
        assert isinstance(inspect.getattr_static(ServiceClient, name), property)


def test_a_handle_has_the_members_of_its_page(service: ServiceClient, tc: TrainingClient) -> None:
    """id, status and operation are properties; the rest is asked, and answers as the page says."""
    future = tc.forward_backward(BATCH)
    assert isinstance(future, FutureHandle)
    for name in ("id", "status", "operation"):
        assert isinstance(inspect.getattr_static(FutureHandle, name), property)
    assert future.id.startswith("fut-")
    assert future.operation == "forward_backward"
    assert future.wait(timeout=60) is True
    assert (future.is_done(), future.is_success(), future.is_failed()) == (True, True, False)
    assert (future.status, future.get_error(), future.cancel()) == ("completed", None, False)
    assert service.get_future(future.id).result(timeout=60) == future.result()


def test_a_handle_of_a_failure(tc: TrainingClient) -> None:
    """``wait`` returns and ``get_error`` gives the error, without raising; ``result`` raises it, typed."""
    future = tc.forward_backward({"input_ids": [[10**6, 1]]})
    assert future.wait(timeout=60) is True
    assert (future.status, future.is_failed(), future.is_success()) == ("failed", True, False)
    assert isinstance(future.get_error(), InvalidRequestError)
    with pytest.raises(InvalidRequestError):
        future.result()


def test_progress_is_seen_without_waiting(tc: TrainingClient) -> None:
    """A loop around ``is_done`` comes to its end although nobody waits for the result."""
    future = tc.forward_backward(BATCH)
    deadline = time.monotonic() + 60
    while not future.is_done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert future.is_success()


def test_cancelled_after_a_timeout_and_tried_again(tc: TrainingClient) -> None:
    """A wait that is over leaves the operation to be cancelled; then it has no effect, and the next try has one."""
    for _ in range(3):
        tc.forward_backward(LONG)
    late = tc.forward_backward(BATCH)
    with pytest.raises(FutureTimeoutError) as caught:
        late.result(timeout=0.001)
    assert (caught.value.future_id, caught.value.timeout) == (late.id, 0.001)
    assert late.cancel() is True
    with pytest.raises(FutureCancelledError) as ended:
        late.result()
    assert (ended.value.future_id, late.status) == (late.id, "cancelled")
    assert tc.forward_backward(BATCH).result(timeout=120).loss > 0


def test_pairs_may_be_queued_and_forgotten(tc: TrainingClient) -> None:
    """Steps are taken in order whether or not anybody waits for those before the last."""
    steps = [(tc.forward_backward(BATCH), tc.optim_step()) for _ in range(5)]
    assert steps[-1][1].result(timeout=120).step == tc.step == 5


def test_a_config_is_made_of_a_dict_as_yaml_gives_it() -> None:
    """``TrainingConfig(**fields)`` takes nested dicts, and has every field of the page."""
    nested = {"lora_config": {"rank": 4}, "optimizer": {"name": "sgd"}, "dp_config": {"enabled": False}}
    config = TrainingConfig(model_ref="m", **nested)  # type: ignore[arg-type]
    assert (config.lora_config.rank, config.optimizer.name) == (4, "sgd")
    assert {"batch_size", "gradient_accumulation_steps", "max_steps", "max_sequence_length", "mixed_precision"} | {
        "gradient_checkpointing",
        "metadata",
        "seed",
    } <= {field.name for field in attrs.fields(TrainingConfig)}


@pytest.mark.parametrize(
    ("kind", "status", "attributes"),
    [
        (TGTinkerError, 500, ("code", "message", "details", "request_id")),
        (AuthenticationError, 401, ()),
        (AuthorizationError, 403, ()),
        (InvalidRequestError, 422, ("field", "constraint")),
        (ResourceNotFoundError, 404, ("resource_type", "resource_id")),
        (RateLimitedError, 429, ("retry_after",)),
        (DPBudgetExceededError, 400, ("current_epsilon", "max_epsilon", "delta")),
        (FutureTimeoutError, 408, ("future_id", "timeout")),
        (FutureCancelledError, 409, ("future_id",)),
        (ServerError, 500, ()),
    ],
)
def test_the_errors_of_the_page(kind: type[TGTinkerError], status: int, attributes: tuple[str, ...]) -> None:
    """Each is exported, one of the tree, has its HTTP status, and carries its attributes through the wire."""
    assert getattr(tg_tinker, kind.__name__) is kind
    assert issubclass(kind, TGTinkerError)
    assert kind.http_status == status
    told = {name: name for name in attributes if name not in {"code", "message", "details", "request_id"}}
    error = tg_tinker.errors.restore(kind, "what", "CODE", told, "req-1")
    assert {name: getattr(error, name) for name in told} == told
    assert (error.code, error.message, error.request_id) == ("CODE", "what", "req-1")
    assert error.to_wire() == {"error": {"code": "CODE", "message": "what", "details": told, "request_id": "req-1"}}
