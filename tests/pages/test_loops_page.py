"""Every example and entry of the Loops TrainingClient page, run with the import line and the model's name changed."""

from __future__ import annotations

import inspect
from typing import Any

import attrs
import pytest
from fixtures.programs import MODEL

from tg_tinker import loops
from tg_tinker.loops import SamplingClient, ServiceClient, TrainingClient

pytestmark = pytest.mark.timeout(240)

EXAMPLE = """
from tg_tinker.loops import Datum, ModelInput, TensorData, AdamParams

# tokens and targets come from tokenizing a masked prompt/answer pair;
# see the quickstart for the full tokenization step.
datum = Datum(
    model_input=ModelInput.from_ints(tokens),
    loss_fn_inputs={"target_tokens": TensorData(data=targets, dtype="int64", shape=[len(targets)])},
)

fb = training_client.forward_backward(data=[datum]).result(timeout=600.0)
training_client.optim_step(AdamParams(learning_rate=4e-5)).result(timeout=600.0)
save_resp = training_client.save_state(name="step-1").result(timeout=600.0)
"""


def test_the_example_of_the_page() -> None:
    """One training step and a checkpoint, as the page has it."""
    with ServiceClient() as service:
        training_client = service.create_lora_training_client(base_model=MODEL, rank=8)
        names: dict[str, Any] = {"training_client": training_client, "tokens": [1, 2, 3], "targets": [-100, 3, 4]}
        exec(EXAMPLE, names)
        assert names["fb"].loss > 0
        assert names["save_resp"].path == f"bt://loops:{training_client.run_id}/weights/step-1"
        assert training_client.policy_version == 1


EMPTY = inspect.Parameter.empty
ENTRIES: dict[str, dict[str, Any]] = {
    "forward_backward": {"data": EMPTY, "loss_fn": "cross_entropy", "loss_fn_config": None},
    "forward": {"data": EMPTY, "loss_fn": "cross_entropy", "loss_fn_config": None},
    "optim_step": {"adam_params": EMPTY},
    "save_state": {"name": EMPTY, "ttl_seconds": None},
    "save_weights_for_sampler": {"name": EMPTY, "ttl_seconds": None},
    "load_state": {"path": EMPTY},
    "load_state_with_optimizer": {"path": EMPTY},
    "list_checkpoints": {},
    "get_checkpoint_archive_url": {"checkpoint_id": EMPTY, "page_size": 1000, "page_token": 0},
    "create_sampling_client": {"model_path": EMPTY},
    "get_tokenizer": {},
    "get_info": {},
    "init_trainer_server": {"lora_rank": EMPTY},
    "health": {},
    "close": {},
    "aclose": {},
}


@pytest.mark.parametrize("name", list(ENTRIES))
def test_entries_have_the_parameters_of_the_page(name: str) -> None:
    """Each entry takes the page's parameters, in order and with its defaults."""
    parameters = inspect.signature(getattr(TrainingClient, name)).parameters
    assert {key: one.default for key, one in parameters.items() if key != "self"} == ENTRIES[name]
    assert list(parameters)[1:] == list(ENTRIES[name])


RETURNS = {
    "forward_backward": "OperationFuture[ForwardBackwardOutput]",  # ForwardBackwardFuture
    "forward": "OperationFuture[ForwardBackwardOutput]",
    "optim_step": "OperationFuture[OptimStepResponse]",
    "save_state": "OperationFuture[SaveWeightsResponse]",
    "save_weights_for_sampler": "OperationFuture[SaveWeightsForSamplerResponse]",  # the name since 0.9, see below
    "load_state": "OperationFuture[LoadWeightsResponse]",
    "load_state_with_optimizer": "OperationFuture[LoadWeightsResponse]",
    "list_checkpoints": "list[Checkpoint]",
    "get_checkpoint_archive_url": "CheckpointFilesResponse",
    "create_sampling_client": "SamplingClient",
    "get_tokenizer": "PreTrainedTokenizerBase",  # what PreTrainedTokenizer and the fast ones have in common
    "get_info": "GetInfoResponse",
    "init_trainer_server": "OperationFuture[InitTrainerServerResponse]",
    "health": "None",
    "close": "None",
    "aclose": "None",
}


@pytest.mark.parametrize("name", list(ENTRIES))
def test_entries_return_what_the_page_says(name: str) -> None:
    """Each entry gives the page's type, a long one as a future of it; its twin gives the same, awaited."""
    assert str(inspect.signature(getattr(TrainingClient, name)).return_annotation) == RETURNS[name]
    twin = getattr(TrainingClient, f"{name}_async", None)
    if inspect.iscoroutinefunction(twin):
        assert inspect.signature(twin).return_annotation == RETURNS[name]
    elif twin is not None:
        assert inspect.signature(twin).return_annotation == f"Coroutine[Any, Any, {RETURNS[name]}]"


def test_a_publish_answers_with_all_that_the_page_names() -> None:
    """The response of ``save_weights_for_sampler`` has the fields of ``SaveWeightsResponse``, and its version."""
    fields = {field.name for field in attrs.fields(loops.SaveWeightsForSamplerResponse)}
    assert fields == {field.name for field in attrs.fields(loops.SaveWeightsResponse)} | {"version"}


def test_the_composed_entry_takes_a_name() -> None:
    """``save_weights_and_get_sampling_client`` takes the name, and gives a future of a ``SamplingClient``."""
    signature = inspect.signature(TrainingClient.save_weights_and_get_sampling_client)
    assert list(signature.parameters)[1:] == ["name"]
    assert signature.return_annotation == "OperationFuture[SamplingClient]"


@pytest.mark.parametrize(
    "name",
    [name for name in ENTRIES if name not in {"get_info", "close", "aclose"}]
    + ["save_weights_and_get_sampling_client", "forward_backward_custom", "policy_version"],
)
def test_every_operation_has_its_awaitable_form(name: str) -> None:
    """Also those operations have one that the published client blocks in."""
    assert callable(getattr(TrainingClient, f"{name}_async"))


def test_run_id_and_policy_version_are_properties() -> None:
    """The two properties of the page are properties."""
    for name in ("run_id", "policy_version"):
        assert isinstance(inspect.getattr_static(TrainingClient, name), property)


def test_names_of_both_generations() -> None:
    """A program imports the futures and responses by their old or their new names."""
    assert loops.OperationFuture is loops.APIFuture
    assert loops.SampleResult is loops.SampleResponse
    assert loops.ForwardBackwardFuture is loops.OperationFuture
    assert {name for name in loops.__all__ if getattr(loops, name, None) is None} == set()
    assert dir(loops) == sorted(loops.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        loops.nonsense  # noqa: B018 - the look-up is what is tested


def test_a_loops_program_keeps_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a Loops program count here, and a key without a URL is refused with the choice."""
    monkeypatch.setenv("BASETEN_API_KEY", "key")
    with pytest.raises(ValueError, match="LOOPS_BASE_URL"):
        ServiceClient()
    monkeypatch.setenv("LOOPS_BASE_URL", "http://127.0.0.1:9")
    assert ServiceClient().config.base_url == "http://127.0.0.1:9"


def test_the_sampling_client_of_the_page(trainer: TrainingClient) -> None:
    """Publishing gives a client pinned to the version; several operations may be on their way before the first wait."""
    trainer.save_weights_for_sampler("a")
    client = trainer.save_weights_and_get_sampling_client("b").result(timeout=600.0)
    assert isinstance(client, SamplingClient)
    assert client.min_policy_version == 2
    response = client.sample(
        prompt=loops.ModelInput.from_ints([1]), num_samples=1, sampling_params=loops.SamplingParams(max_tokens=2)
    )
    (sequence,) = response.sequences
    assert len(sequence.tokens) == len(sequence.logprobs or ()) in {1, 2}
