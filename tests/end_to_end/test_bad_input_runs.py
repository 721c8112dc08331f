"""Every operation of a run or sampler refuses what it cannot use, by field, and the run stays usable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fixtures.programs import BATCH, LOOPS_RANK, MODEL, datum, tg_config

from tg_tinker import (
    AdamParams,
    Datum,
    InvalidRequestError,
    ModelInput,
    OperationFailedError,
    ResourceNotFoundError,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TensorData,
    TGTinkerError,
    TrainingClient,
    loops,
)

pytestmark = pytest.mark.timeout(240)
VOCABULARY = 264  # of the tiny model
LONGEST = 2048  # tokens


@pytest.fixture(scope="module")
def run(service: ServiceClient) -> TrainingClient:
    """One TG run for the whole matrix."""
    return service.create_training_client(tg_config(max_sequence_length=64))


@pytest.fixture(scope="module")
def loops_run(service: ServiceClient) -> loops.TrainingClient:
    """One Loops run for the whole matrix."""
    return service.create_lora_training_client(MODEL, LOOPS_RANK, seed=1)


@pytest.fixture(scope="module")
def sampler(service: ServiceClient) -> SamplingClient:
    """A sampler of the base model."""
    return service.create_sampling_client(MODEL)


@pytest.mark.parametrize(
    ("batch", "field"),
    [
        (None, "batch"),
        ([[1, 2]], "batch"),
        ({}, "batch.input_ids"),
        ({"input_ids": []}, "batch.input_ids"),
        ({"input_ids": [[1, 2], [3]]}, "batch.input_ids[1]"),
        ({"input_ids": [[1.5]]}, "batch.input_ids"),
        ({"input_ids": [[math.nan]]}, "batch.input_ids"),
        ({"input_ids": [["a"]]}, "batch.input_ids"),
        ({"input_ids": [[1]], "labels": [[1, 2]]}, "batch.labels"),
        ({"input_ids": [[1]], "attention_mask": [[2]]}, "batch.attention_mask"),
        ({"input_ids": [[1]], "lables": [[1]]}, "batch.lables"),
    ],
    ids=str,
)
def test_a_wrong_batch_is_refused_at_the_call(run: TrainingClient, batch: Any, field: str) -> None:
    """Shape, type and name errors of a batch are raised by the call itself, before anything is sent."""
    with pytest.raises(InvalidRequestError) as caught:
        run.forward_backward(batch)
    assert caught.value.field == field
    assert any(problem.endswith(f"@ $.{field}") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"input_ids": [[1, VOCABULARY]]}, "264"),
        ({"input_ids": [[1, 2]], "labels": [[1, 10**6]]}, "1000000"),
        ({"input_ids": [[1] * 65]}, "64"),
    ],
    ids=["vocabulary", "labels", "too long"],
)
def test_what_the_model_cannot_take_is_refused(run: TrainingClient, batch: Any, told: str) -> None:
    """Ids out of vocabulary and rows beyond the run's limit are errors; the run goes on."""
    with pytest.raises(InvalidRequestError, match=told):
        run.forward_backward(batch).result(timeout=60)
    assert run.forward_backward(BATCH).result(timeout=60).loss > 0


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda run: run.forward_backward(BATCH, 5), "batch_hash"),
        (lambda run: run.optim_step("yes"), "apply_dp_noise"),
        (lambda run: run.sample(""), "prompts[0]"),
        (lambda run: run.sample([]), "prompts"),
        (lambda run: run.sample(["a", None]), "prompts[1]"),
        (lambda run: run.sample(["a", "\ud800"]), "prompts[1]"),
        (lambda run: run.sample(["a", "b" * 3000]), "prompts[1]"),
        (lambda run: run.sample(5), "prompts"),
        (lambda run: run.sample("a", max_tokens=-1), "max_tokens"),
        (lambda run: run.sample("a", max_tokens=0), "max_tokens"),
        (lambda run: run.sample("a", max_tokens=1.5), "max_tokens"),
        (lambda run: run.sample("a", temperature=-1.0), "temperature"),
        (lambda run: run.sample("a", temperature=math.nan), "temperature"),
        (lambda run: run.sample("a", top_p=0.0), "top_p"),
        (lambda run: run.sample("a", top_p=1.1), "top_p"),
        (lambda run: run.sample("a", top_k=-1), "top_k"),
        (lambda run: run.sample("a", stop_sequences=[""]), "stop_sequences"),
        (lambda run: run.sample("a", num_completions=0), "num_completions"),
        (lambda run: run.sample("a", repetition_penalty=0.0), "repetition_penalty"),
        (lambda run: run.sample("a", presence_penalty=math.inf), "presence_penalty"),
        (lambda run: run.sample("a", frequency_penalty="1"), "frequency_penalty"),
        (lambda run: run.sample("a", seed=-1), "seed"),
        (lambda run: run.sample_stream(["a"]), "prompts"),
        (lambda run: run.sample_stream("a", max_tokens=-1), "max_tokens"),
        (lambda run: run.sample_stream("a", top_pp=0.5), "top_pp"),
        (lambda run: run.save_state("final"), "include_optimizer"),
        (lambda run: run.save_state(metadata=[1]), "metadata"),
        (lambda run: run.save_state(metadata={"x": object()}), "metadata"),
        (lambda run: run.save_state(metadata={"val": {"loss": [math.nan]}}), "metadata"),
        (lambda run: run.save_state(metadata={"loss": np.float32(math.inf)}), "metadata"),
        (lambda run: run.load_state(None), "artifact_id"),
        (lambda run: run.load_state(""), "artifact_id"),
    ],
)
def test_wrong_arguments_of_a_tg_run(run: TrainingClient, call: Callable[[Any], Any], field: str) -> None:
    """Each operation of the TG client checks each argument at the call, by name."""
    with pytest.raises(InvalidRequestError) as caught:
        call(run)
    assert caught.value.field == field


def test_a_misspelt_argument_of_a_stream_is_answered_with_the_nearest_name(run: TrainingClient) -> None:
    """Also where the argument is one that the page names, not one of ``**kwargs``."""
    with pytest.raises(InvalidRequestError, match="max_token: no argument of sample_stream; did you mean 'max_tokens'"):
        run.sample_stream("a", max_token=1)  # type: ignore[call-arg]


NOTHING_TO_PREDICT: list[dict[str, Any]] = [
    {"input_ids": [[1, 2], [3, 4]], "labels": [[-100, -100], [-100, -100]]},
    {"input_ids": [[1, 2]], "labels": [[2, -100]]},  # nothing predicts the first token of a row
    {"input_ids": [[0, 2, 3]], "attention_mask": [[0, 1, 1]], "labels": [[1, 2, -100]]},
    {"input_ids": [[1], [2]]},
]


@pytest.mark.parametrize("batch", NOTHING_TO_PREDICT)
def test_a_batch_with_nothing_to_predict_is_refused(run: TrainingClient, batch: dict[str, Any]) -> None:
    """A mean over no tokens is no loss: the call says so by name, and what was gathered before can be stepped with."""
    good = {"input_ids": [[1, 2, 3]]}
    run.forward_backward(good)
    for switch in (run.eval, run.train):
        switch()
        with pytest.raises(InvalidRequestError, match="a token to predict") as caught:
            run.forward_backward(batch)
        assert caught.value.field == "batch.labels"
    run.forward_backward(good)
    assert run.optim_step().result(timeout=60).grad_norm > 0


def test_rows_with_nothing_to_predict_may_stand_beside_others(run: TrainingClient) -> None:
    """A row without labels adds nothing to the loss of the rest."""
    ids = [[1, 2, 3], [4, 5, 6]]
    mixed = run.forward_backward({"input_ids": ids, "labels": [[1, 2, 3], [-100] * 3]}).result(timeout=60)
    alone = run.forward_backward({"input_ids": ids[:1]}).result(timeout=60)
    assert (mixed.loss, mixed.num_tokens) == (pytest.approx(alone.loss), 2)


def test_datums_with_nothing_to_predict_are_refused(loops_run: loops.TrainingClient) -> None:
    """Targets that are all ignored, and a single token that has no next one, are refused in either pass."""
    ignored = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": TensorData([-100, -100], "int64")})
    for data in ([ignored, ignored], [Datum(ModelInput.from_ints([1]))]):
        for run_pass in (loops_run.forward, loops_run.forward_backward):
            with pytest.raises(InvalidRequestError, match="a target other than -100") as caught:
                run_pass(data)
            assert caught.value.field == "data[*].loss_fn_inputs.target_tokens"
    assert loops_run.forward([ignored, datum()]).result(timeout=60).loss > 0


@pytest.mark.parametrize(
    ("loss_fn", "inputs"),
    [
        ("cross_entropy", {"weights": [0.0] * 5}),
        ("importance_sampling", {"logprobs": [-1.0] * 5, "advantages": [0.0] * 5}),
    ],
)
def test_weights_and_advantages_of_nothing_but_0_are_an_answer(
    loops_run: loops.TrainingClient, loss_fn: Any, inputs: dict[str, list[float]]
) -> None:
    """Completions of equal reward have advantages of 0: there is nothing to learn from them, and that is no error."""
    output = loops_run.forward_backward([datum(**inputs)], loss_fn).result(timeout=60)
    assert (output.loss, output.metrics["num_tokens"]) == (0.0, 0.0)
    assert loops_run.optim_step(loops.AdamParams()).result(timeout=60).metrics["grad_norm"] == 0.0


def test_a_prompt_must_fit_the_model(run: TrainingClient) -> None:
    """A prompt with more tokens than the model has positions is refused, not cut; a completion ends with the room."""
    with pytest.raises(InvalidRequestError, match="2048"):
        run.sample("a" * (LONGEST + 1), max_tokens=1)
    with pytest.raises(InvalidRequestError, match="2048"):
        list(run.sample_stream("a" * (LONGEST + 1), max_tokens=1))
    ended = run.sample("a" * (LONGEST - 4), max_tokens=100, seed=1).samples[0]
    assert ended.num_tokens <= 4


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda run: run.load_state("art-nowhere"), ResourceNotFoundError),
        (lambda run: run.load_state("../../etc/passwd"), TGTinkerError),
    ],
)
def test_unknown_artifacts(run: TrainingClient, call: Callable[[Any], Any], kind: type[Exception]) -> None:
    """An artifact that is not there, or is no artifact, is a typed error."""
    with pytest.raises(kind):
        call(run)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda run: run.forward_backward([]), "data"),
        (lambda run: run.forward_backward(datum()), "data"),
        (lambda run: run.forward_backward([datum(), 3]), "data[1]"),
        (lambda run: run.forward_backward([datum()], "nope"), "loss_fn"),
        (lambda run: run.forward_backward([datum()], None), "loss_fn"),
        (lambda run: run.forward_backward([datum()], "ppo", {"clip": 1.0}), "loss_fn_config.clip"),
        (lambda run: run.forward_backward([datum()] * 4, "importance_sampling"), "data[0].loss_fn_inputs.logprobs"),
        (
            lambda run: run.forward_backward(
                [datum(logprobs=[0.0] * 5, advantages=[0.0] * 5)] * 3 + [datum(logprobs=[0.0] * 5)],
                "importance_sampling",
            ),
            "data[3].loss_fn_inputs.advantages",
        ),
        (
            lambda run: run.forward([datum()], "ppo", {"clip_low_threshold": math.nan}),
            "loss_fn_config.clip_low_threshold",
        ),
        (lambda run: run.forward_backward_custom([datum()], None), "loss_fn"),
        (lambda run: run.forward_backward_custom([datum()], len, loss_type_input="logits"), "loss_type_input"),
        (
            lambda run: run.forward_backward_custom([Datum(ModelInput.from_ints([1]))], len),
            "data[0].loss_fn_inputs.target_tokens",
        ),
        (lambda run: run.optim_step(1e-4), "adam_params"),
        (lambda run: run.optim_step(None), "adam_params"),
        (lambda run: run.save_state(""), "name"),
        (lambda run: run.save_state("a", ttl_seconds=0), "ttl_seconds"),
        (lambda run: run.save_state("a", ttl_seconds=1.5), "ttl_seconds"),
        (lambda run: run.save_weights_for_sampler(None), "name"),
        (lambda run: run.save_weights_and_get_sampling_client(""), "name"),
        (lambda run: run.load_state("step-1"), "path"),
        (lambda run: run.load_state_with_optimizer("bt://loops:x"), "path"),
        (lambda run: run.create_sampling_client("kept"), "model_path"),
        (lambda run: run.init_trainer_server(0), "lora_rank"),
        (lambda run: run.init_trainer_server(True), "lora_rank"),
        (lambda run: run.get_checkpoint_archive_url(""), "checkpoint_id"),
        (lambda run: run.get_checkpoint_archive_url("a", page_size=0), "page_size"),
        (lambda run: run.get_checkpoint_archive_url("a", page_token=-1), "page_token"),
    ],
)
def test_wrong_arguments_of_a_loops_run(
    loops_run: loops.TrainingClient, call: Callable[[Any], Any], field: str
) -> None:
    """Each operation of the Loops client checks each argument at the call, with the path to what is wrong."""
    with pytest.raises(InvalidRequestError) as caught:
        call(loops_run)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([datum(1, VOCABULARY, 3)], "264"),
        (
            [datum(), Datum(ModelInput.from_ints([1, 2]), {"target_tokens": TensorData([2, 10**6], "int64")})],
            r"data\[1\]",
        ),
        ([datum(*[1] * (LONGEST + 1))], "2048"),
    ],
    ids=["vocabulary", "targets", "too long"],
)
def test_data_that_the_model_cannot_take(loops_run: loops.TrainingClient, data: list[Datum], told: str) -> None:
    """What only the server can know comes out of the call or the future, names the datum, and spoils nothing."""
    with pytest.raises(InvalidRequestError, match=told):
        loops_run.forward_backward(data).result(timeout=60)
    assert loops_run.forward_backward([datum()]).result(timeout=60).loss > 0


def test_nan_where_it_counts_is_refused_and_ignored_where_it_does_not(loops_run: loops.TrainingClient) -> None:
    """A NaN at an active position names datum and tensor; at a masked one it enters nothing."""
    good = datum(logprobs=[-1.0] * 4 + [math.nan], advantages=[1.0] * 4 + [math.nan])
    assert math.isfinite(loops_run.forward([good], "importance_sampling").result(timeout=60).loss)
    bad = datum(logprobs=[-1.0] * 5, advantages=[1.0, math.nan, 1.0, 1.0, 1.0])
    with pytest.raises(InvalidRequestError, match=r"data\[1\].*advantages"):
        loops_run.forward([good, bad], "importance_sampling").result(timeout=60)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_is_called_so(loops_run: loops.TrainingClient, value: float) -> None:
    """JSON has neither NaN nor infinity, so the server cannot tell one from the other, and claims neither."""
    bad = datum(logprobs=[-1.0] * 5, advantages=[1.0, value, 1.0, 1.0, 1.0])
    told = r"^data\[0\]\.loss_fn_inputs\.advantages\[1\]: expected a finite number, got one that is not"
    with pytest.raises(InvalidRequestError, match=told):
        loops_run.forward([bad], "importance_sampling").result(timeout=60)


def test_a_run_that_diverged_says_so(service: ServiceClient) -> None:
    """After an absurd step each pass fails by name, training or not; a fresh adapter makes the run usable again."""
    run = service.create_lora_training_client(MODEL, 2, seed=1)
    run.forward_backward([datum()])
    run.optim_step(AdamParams(learning_rate=1e38)).result(timeout=60)
    for attempt in (run.forward, run.forward_backward):
        with pytest.raises(OperationFailedError, match="the loss is not finite"):
            attempt([datum()]).result(timeout=60)
    run.init_trainer_server(2)
    assert run.forward([datum()]).result(timeout=60).loss > 0


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda client: client.sample("text"), "prompt"),
        (lambda client: client.sample([]), "prompt"),
        (lambda client: client.sample([-1]), "prompt.tokens"),
        (lambda client: client.sample([1], 0), "num_samples"),
        (lambda client: client.sample([1], 1, {"max_tokens": 1}), "sampling_params"),
        (lambda client: client.sample([1], 1, None, 1), "include_prompt_logprobs"),
        (lambda client: client.sample([1], topk_prompt_logprobs=-1), "topk_prompt_logprobs"),
        (lambda client: client.sample([1], affinity_key=""), "affinity_key"),
        (lambda client: client.compute_logprobs([]), "prompt"),
        (lambda client: client.ensure_ready(-1.0), "ready_timeout"),
        (lambda client: client.ensure_ready(math.nan), "ready_timeout"),
    ],
)
def test_wrong_arguments_of_a_sampler(sampler: SamplingClient, call: Callable[[Any], Any], field: str) -> None:
    """Each operation of the sampling client checks each argument at the call."""
    with pytest.raises(InvalidRequestError) as caught:
        call(sampler)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("prompt", "params", "told"),
    [
        ([1, VOCABULARY], SamplingParams(max_tokens=1), "264"),
        ([1] * (LONGEST + 1), SamplingParams(max_tokens=1), "2048"),
    ],
    ids=["vocabulary", "too long"],
)
def test_prompts_that_the_model_cannot_take(
    sampler: SamplingClient, prompt: list[int], params: SamplingParams, told: str
) -> None:
    """Prompts out of vocabulary or beyond the model's length are refused."""
    with pytest.raises(InvalidRequestError, match=told):
        sampler.sample(prompt, 1, params)
