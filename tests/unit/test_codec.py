"""The codec: exact on writing, tolerant on reading, and every fault with its path."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import loops, loops_results, results
from tg_tinker.types.batch import BatchData
from tg_tinker.types.config import TrainingConfig
from tg_tinker.types.loops import Datum, ModelInput
from tg_tinker.types.tensor import TensorData
from tg_tinker.wire import codec, tg
from tg_tinker.wire import loops as loops_wire

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)


def _again(value: Any) -> Any:
    return codec.decode(type(value), codec.loads(codec.dumps(value)))


@pytest.mark.parametrize(
    "value",
    [
        results.ForwardBackwardResult(
            loss=1.5, batch_hash="sha256:a", gradient_hash="sha256:b", num_tokens=3, latency_ms=0.1
        ),
        results.OptimStepResult(
            grad_norm=1.0,
            learning_rate=1e-4,
            step=2,
            dp_metrics=results.DPMetrics(
                noise_applied=True,
                epsilon_spent=0.1,
                total_epsilon=0.2,
                delta=1e-5,
                grad_norm_before_clip=2.0,
                grad_norm_after_clip=1.0,
                num_clipped=3,
            ),
            latency_ms=0.2,
        ),
        results.SampleResult(
            samples=(
                results.Sample(
                    prompt="p",
                    completion="é",
                    num_tokens=1,
                    finish_reason="eos",
                    latency_ms=1.0,
                    token_ids=(1,),
                    logprobs=(-0.5,),
                ),
            ),
            total_tokens=1,
            latency_ms=1.0,
            model_step=0,
        ),
        results.StreamChunk(text="a", index=0, token_ids=(5,), finish_reason="length"),
        results.SaveStateResult(
            artifact_id="art-1",
            size_bytes=3,
            encryption=results.EncryptionInfo(algorithm="AES256_GCM", key_id="k", format="f"),
            metadata={"epoch": 5, "nested": {"a": [1, 2]}},
            timestamp=NOW,
            step=4,
        ),
        results.LoadStateResult(
            artifact_id="art-1", step=4, metadata={}, timestamp=NOW, exact=False, reasons=("device",)
        ),
        loops_results.OptimStepResponse(metrics={"step": 1.0}),
        loops_results.SampleResponse(
            sequences=(
                loops_results.SampledSequence(tokens=(1, 2), logprobs=(-1.0, -2.0), stop_reason="stop", text="x"),
            ),
            policy_version=3,
            prompt_logprobs=(None, -0.25),
            topk_prompt_logprobs=(None, ((4, -0.5), (5, -1.5))),
        ),
        loops_results.ForwardBackwardOutput(
            loss=0.5, loss_fn_outputs=({"logprobs": TensorData([0.0, -1.0])},), metrics={"loss": 0.5}
        ),
        loops_results.GetInfoResponse(
            model_data=loops_results.ModelData(model_name="m"),
            model_name="m",
            is_lora=True,
            lora_rank=8,
            max_seq_len=None,
        ),
        tg.FutureInfo(
            future_id="fut-1", status="pending", created_at=NOW, training_client_id="tc-1", operation="sample"
        ),
        tg.SampleRequest(prompts=("a", "b"), seed=1),
        loops_wire.OptimStepRequest(adam_params=loops.AdamParams(learning_rate=1e-3)),
        loops_wire.Accepted(operation_id="op-1"),
        TrainingConfig(model_ref="m", dp_config={"target_epsilon": 3.0}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_value_survives_the_wire(value: Any) -> None:
    """Encoding and decoding gives an equal value, nested values, tuples and times included."""
    assert _again(value) == value


@pytest.mark.parametrize(
    "value",
    [
        results.LoadStateResult(artifact_id="a", step=1, metadata={"x": 1}, timestamp=NOW),
        results.SampleResult(
            samples=(results.Sample(prompt="p", completion="c", num_tokens=1, finish_reason="stop", latency_ms=1.0),),
            total_tokens=1,
            latency_ms=1.0,
            model_step=1,
        ),
        loops_results.ForwardBackwardOutput(loss_fn_outputs=({"logprobs": TensorData([1.0])},)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_to_dict_is_plain_json(value: Any) -> None:
    """``to_dict`` holds nothing that json cannot write, and says what the wire says."""
    assert json.loads(json.dumps(value.to_dict())) == codec.loads(codec.dumps(value))


def test_a_batch_and_its_datums_survive_as_arrays() -> None:
    """Batches and datums come back as arrays with the same numbers."""
    batch = BatchData([[1, 2], [3, 4]], [[1, 1], [0, 1]])
    assert _again(batch).to_dict() == batch.to_dict()
    datum = Datum(ModelInput.from_ints([1, 2]), {"advantages": TensorData([0.5, -0.5])})
    assert _again(datum).to_dict() == datum.to_dict()
    request = loops_wire.PassRequest(data=(datum,), loss_fn="ppo", loss_fn_config={"clip_low_threshold": 0.9})
    assert _again(request).data[0].to_dict() == datum.to_dict()


def test_unknown_fields_are_ignored_but_not_in_configs() -> None:
    """A newer peer may say more than we know; a config field that we do not know is a typo."""
    assert codec.decode(loops_wire.Accepted, {"operation_id": "x", "colour": "red"}).operation_id == "x"
    with pytest.raises(InvalidRequestError, match="did you mean 'rank'"):
        codec.decode(TrainingConfig, {"model_ref": "m", "lora_config": {"rnk": 2}})


@pytest.mark.parametrize(
    ("kind", "data", "path"),
    [
        (loops_wire.OptimStepRequest, {"adam_params": {"learning_rate": -1.0}}, "adam_params.learning_rate"),
        (loops_wire.OptimStepRequest, {}, "adam_params"),
        (loops_wire.LoadStateRequest, {"path": 3}, "path"),
        (tg.OptimStepRequest, {"apply_dp_noise": "false"}, "apply_dp_noise"),
        (tg.SampleRequest, {"prompts": ["a"], "max_tokens": -1}, "max_tokens"),
        (tg.SampleRequest, {"prompts": ["a"], "max_tokens": 1.5}, "max_tokens"),
        (tg.ForwardBackwardRequest, {"batch": {"input_ids": [[1, 2], [3]]}}, "batch.input_ids[1]"),
        (tg.ForwardBackwardRequest, {"batch": {"input_ids": [[1]]}, "mode": "test"}, "mode"),
        (
            loops_wire.PassRequest,
            {
                "data": [{"model_input": {"chunks": [{"tokens": [1]}]}}] * 3
                + [{"model_input": {"chunks": [{"tokens": [-1]}]}}]
            },
            "data[3].model_input.chunks[0].tokens",
        ),
        (
            loops_wire.PassRequest,
            {
                "data": [
                    {
                        "model_input": {"chunks": [{"tokens": [1, 2]}]},
                        "loss_fn_inputs": {"advantages": {"data": [1.0], "dtype": "float32", "shape": [1]}},
                    }
                ]
            },
            "data[0].loss_fn_inputs.advantages",
        ),
        (
            loops_wire.PassRequest,
            {
                "data": [
                    {
                        "model_input": {"chunks": [{"tokens": [1]}]},
                        "loss_fn_inputs": {"advantages": {"dtype": "float32"}},
                    }
                ]
            },
            "data[0].loss_fn_inputs.advantages.data",
        ),
        (
            loops_wire.PassRequest,
            {"data": [{"model_input": {"chunks": [{"type": "image", "tokens": [1]}]}}]},
            "data[0].model_input.chunks[0].type",
        ),
        (
            loops_wire.PassRequest,
            {
                "data": [
                    {
                        "model_input": {"chunks": [{"tokens": [1]}]},
                        "routed_experts_ref": {"uri": "bt://loops:run/sequences/s", "version": 1},
                    }
                ]
            },
            "data[0].routed_experts_ref",
        ),
    ],
    ids=str,
)
def test_a_fault_is_reported_with_its_path(kind: type[Any], data: Any, path: str) -> None:
    """The error names the innermost field that is wrong, from the root of the body."""
    with pytest.raises(InvalidRequestError) as caught:
        codec.decode(kind, data)
    assert caught.value.field == path
    assert any(problem.endswith(f"@ $.{path}") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("kind", "data", "wanted"),
    [
        (tg.SampleRequest, {"prompts": ["a"], "max_tokens": -1}, "an integer of at least 1"),
        (tg.SampleRequest, {"prompts": ["a"], "top_p": 2.0}, "a finite number greater than 0.0 and at most 1.0"),
        (tg.SampleRequest, {}, "a value (the field is required)"),
    ],
    ids=str,
)
def test_a_fault_says_what_was_expected(kind: type[Any], data: Any, wanted: str) -> None:
    """``constraint`` is there for what arrived by HTTP as it is for an argument."""
    with pytest.raises(InvalidRequestError) as caught:
        codec.decode(kind, data)
    assert caught.value.constraint == wanted


def test_all_faults_are_reported_together() -> None:
    """A body that is wrong in two places is answered with both."""
    with pytest.raises(InvalidRequestError) as caught:
        codec.decode(loops_wire.SaveStateRequest, {"name": 3, "ttl_seconds": "soon"})
    assert len(caught.value.problems) == 2
    assert {problem.rpartition("@ $.")[2] for problem in caught.value.problems} == {"name", "ttl_seconds"}


def test_broken_json_is_a_typed_error() -> None:
    """A body that is no JSON is named as that."""
    with pytest.raises(InvalidRequestError, match="not valid JSON"):
        codec.loads(b"{")


def test_arrays_are_written_as_numbers_without_lists() -> None:
    """Numpy arrays go out as JSON numbers, int and float alike, in full precision."""
    assert codec.dumps({"ids": np.array([1, 2]), "x": np.array([0.1], np.float32)}) == b'{"ids":[1,2],"x":[0.1]}'


@given(
    st.lists(st.integers(0, 2**31), min_size=1, max_size=20),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
)
def test_every_datum_survives_the_wire(tokens: list[int], values: list[float]) -> None:
    """Tokens and float32 values of any datum come back bit for bit."""
    size = min(len(tokens), len(values))
    datum = Datum(ModelInput.from_ints(tokens[:size]), {"advantages": TensorData(values[:size])})
    back = _again(datum)
    assert back.model_input == datum.model_input
    assert back.loss_fn_inputs["advantages"] == datum.loss_fn_inputs["advantages"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
def test_metadata_of_any_shape_survives(metadata: Any) -> None:
    """Whatever JSON a user stores as metadata comes back equal."""
    request = tg.SaveStateRequest(metadata={"user": metadata})
    assert _again(request) == request


def test_frozen_values_are_hashable_or_plainly_not() -> None:
    """Values that hold arrays refuse to be hashed rather than hash by identity by accident."""
    with pytest.raises(TypeError):
        hash(TensorData([1.0]))
    assert attrs.has(TensorData)
