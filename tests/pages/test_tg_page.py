"""Every example of the TrainingClient page of the TG surface, run as it stands but for the model's name."""

from __future__ import annotations

import datetime as dt
import inspect
import typing
from typing import Any

import attrs
import pytest

import tg_tinker
from tg_tinker import ServiceClient, TrainingClient
from tg_tinker.types import results

pytestmark = pytest.mark.timeout(240)

OVERVIEW = """
from tg_tinker import ServiceClient, TrainingConfig, LoRAConfig

service = ServiceClient()
config = TrainingConfig(
    model_ref="tg-tinker/tiny",
    lora_config=LoRAConfig(rank=16),
)

tc = service.create_training_client(config)
"""

FORWARD_BACKWARD = """
batch = {
    "input_ids": input_ids,
    "attention_mask": attention_mask,
    "labels": labels,
}

future = tc.forward_backward(batch)
result = future.result()

print(f"Loss: {result.loss}")
print(f"Gradient hash: {result.gradient_hash}")
"""

OPTIM_STEP = """
future = tc.optim_step(apply_dp_noise=True)
result = future.result()

print(f"Gradient norm: {result.grad_norm}")
print(f"Learning rate: {result.learning_rate}")

if result.dp_metrics:
    print(f"Epsilon spent: {result.dp_metrics.epsilon_spent}")
"""

TRAIN = """
tc.train()
for batch in train_loader:
    tc.forward_backward(batch).result()
    tc.optim_step().result()
"""

EVAL = """
tc.eval()
for batch in val_loader:
    result = tc.forward_backward(batch).result()
    val_losses.append(result.loss)
"""

SAMPLE = """
result = tc.sample(
    prompts=["Once upon a time", "In a galaxy far away"],
    max_tokens=100,
    temperature=0.7,
    top_p=0.9,
)

for sample in result.samples:
    print(f"Prompt: {sample.prompt}")
    print(f"Completion: {sample.completion}")
    print(f"Tokens: {sample.num_tokens}")
"""

SAMPLE_STREAM = """
for chunk in tc.sample_stream(
    prompts="Tell me a story",
    max_tokens=500,
):
    print(chunk.text, end="", flush=True)
"""

SAVE_STATE = """
checkpoint = tc.save_state(
    include_optimizer=True,
    metadata={
        "epoch": 5,
        "val_loss": 0.42,
        "dataset": "my-dataset-v2",
    }
)

print(f"Artifact ID: {checkpoint.artifact_id}")
print(f"Size: {checkpoint.size_bytes}")
print(f"Encryption: {checkpoint.encryption.algorithm}")
"""

LOAD_STATE = """
result = tc.load_state(checkpoint.artifact_id)

print(f"Loaded step: {tc.step}")
print(f"Loaded metadata: {result.metadata}")
"""

ERRORS = """
from tg_tinker import (
    TGTinkerError,
    DPBudgetExceededError,
    FutureTimeoutError,
    InvalidRequestError,
)

try:
    result = tc.forward_backward(batch).result(timeout=60)
except FutureTimeoutError:
    print("Operation timed out")
except DPBudgetExceededError as e:
    print(f"DP budget exceeded: {e}")
    tc.save_state()  # Save before stopping
except InvalidRequestError as e:
    print(f"Invalid batch: {e}")
except TGTinkerError as e:
    print(f"API error: {e}")
"""

BATCH = {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]], "labels": [[-100, 2, 3]]}


def test_the_page_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    """All examples, one after the other in one program, print what they announce."""
    names: dict[str, Any] = {**BATCH, "train_loader": [BATCH] * 3, "val_loader": [BATCH] * 2, "val_losses": []}
    for block in (OVERVIEW, FORWARD_BACKWARD, OPTIM_STEP, TRAIN, EVAL, SAMPLE, SAMPLE_STREAM, SAVE_STATE, LOAD_STATE):
        exec(block, names)
    printed = capsys.readouterr().out
    for line in ("Loss: ", "Gradient hash: sha256:", "Gradient norm: ", "Learning rate: 0.0001", "Artifact ID: art-"):
        assert line in printed
    assert "Prompt: In a galaxy far away" in printed
    assert "Encryption: AES-256-GCM" in printed
    assert "Loaded step: 4" in printed
    assert names["result"].metadata == {"epoch": 5, "val_loss": 0.42, "dataset": "my-dataset-v2"}
    assert len(names["val_losses"]) == 2
    names["service"].close()


@pytest.mark.parametrize(
    ("batch", "printed"), [(BATCH, ""), ({"input_ids": [[1, 2], [3]]}, "Invalid batch: batch.input_ids[1]")]
)
def test_the_error_handling_of_the_page(
    tc: TrainingClient, capsys: pytest.CaptureFixture[str], batch: dict[str, Any], printed: str
) -> None:
    """The page's except clauses catch what they say they do."""
    exec(ERRORS, {"tc": tc, "batch": batch})
    assert capsys.readouterr().out.startswith(printed)


SIGNATURES = {
    "forward_backward": {"batch": inspect.Parameter.empty, "batch_hash": None},
    "optim_step": {"apply_dp_noise": True},
    "train": {},
    "eval": {},
    "sample": {
        "prompts": inspect.Parameter.empty,
        "max_tokens": 128,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": None,
        "stop_sequences": None,
        "num_completions": 1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    },
    "sample_stream": {"prompts": inspect.Parameter.empty, "max_tokens": 128, "temperature": 1.0},
    "save_state": {"include_optimizer": True, "metadata": None},
    "load_state": {"artifact_id": inspect.Parameter.empty},
}


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_signatures_are_those_of_the_page(name: str) -> None:
    """Each method takes the page's parameters in the page's order, with its defaults, positionally too."""
    parameters = list(inspect.signature(getattr(TrainingClient, name)).parameters.values())[1:]
    positional = {one.name: one.default for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(SIGNATURES[name].items())


@pytest.mark.parametrize("name", [name for name in SIGNATURES if name not in {"train", "eval"}])
def test_every_operation_has_its_awaitable_form(name: str) -> None:
    """The twin takes the same parameters and carries the same words."""
    face, twin = getattr(TrainingClient, name), getattr(TrainingClient, f"{name}_async")
    assert inspect.signature(twin).parameters == inspect.signature(face).parameters
    assert twin.__doc__ == face.__doc__


FIELDS: dict[str, dict[str, Any]] = {
    "ForwardBackwardResult": {
        "loss": float,
        "batch_hash": str,
        "gradient_hash": str,
        "num_tokens": int,
        "latency_ms": float,
    },
    "OptimStepResult": {
        "grad_norm": float,
        "learning_rate": float,
        "step": int,
        "dp_metrics": results.DPMetrics | None,
        "latency_ms": float,
    },
    "SampleResult": {"samples": tuple[results.Sample, ...], "total_tokens": int, "latency_ms": float},
    "Sample": {
        "prompt": str,
        "completion": str,
        "num_tokens": int,
        "finish_reason": results.FinishReason,
        "latency_ms": float,
    },
    "SaveStateResult": {
        "artifact_id": str,
        "size_bytes": int,
        "encryption": results.EncryptionInfo,
        "metadata": dict[str, Any],
        "timestamp": dt.datetime,
    },
    "LoadStateResult": {"artifact_id": str, "step": int, "metadata": dict[str, Any], "timestamp": dt.datetime},
    "DPMetrics": {
        "noise_applied": bool,
        "epsilon_spent": float | None,
        "total_epsilon": float | None,
        "delta": float,
        "grad_norm_before_clip": float,
        "grad_norm_after_clip": float,
        "num_clipped": int,
    },
}


@pytest.mark.parametrize("name", list(FIELDS))
def test_result_types_have_the_fields_of_the_page(name: str) -> None:
    """Every field of the page's result types is there, under its name and of its type."""
    kind = getattr(tg_tinker, name)
    hints = typing.get_type_hints(kind)
    assert {field: hints[field] for field in FIELDS[name]} == FIELDS[name]
    assert set(FIELDS[name]) <= {field.name for field in attrs.fields(kind)}


def test_properties_are_those_of_the_page(service: ServiceClient, tc: TrainingClient) -> None:
    """id, step, config and status are properties, and read as the page says."""
    assert (type(tc.id), tc.step, tc.status) == (str, 0, "active")
    assert tc.config.model_ref == "tg-tinker/tiny"
    for name in ("id", "step", "config", "status"):
        assert isinstance(inspect.getattr_static(TrainingClient, name), property)
    assert service.tenant_id == "local"
