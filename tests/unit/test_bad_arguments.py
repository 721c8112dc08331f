"""What is wrong is said at the call, by a typed error that names it; nothing raw comes out of a library below."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import attrs
import pytest

from tg_tinker import (
    AdamParams,
    BatchData,
    Datum,
    DPConfig,
    LoRAConfig,
    ModelInput,
    OptimizerConfig,
    PoissonSampler,
    SamplingConfig,
    SamplingParams,
    ServiceClient,
    TensorData,
    TrainingConfig,
)
from tg_tinker import loops as loops_surface
from tg_tinker.core.call import call
from tg_tinker.errors import InvalidRequestError
from tg_tinker.store.offline import open_artifact
from tg_tinker.types import arguments, checks, losses
from tg_tinker.types.loops import EncodedTextChunk
from tg_tinker.wire import loops, tg
from tg_tinker.wire.json_object import json_object

HALF = "\ud800"  # half of a surrogate pair: text that UTF-8 cannot write


class Letters:
    """A tokenizer that knows letters, and refuses as the real ones do."""

    eos_token_id = 0
    pad_token_id = 0

    def encode(self, text: str, **_: object) -> list[int]:
        """One token a letter."""
        if HALF in text:
            raise TypeError("TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]")
        return [ord(letter) for letter in text]


def nested(depth: int) -> dict[str, Any]:
    """A dict in a dict in a dict."""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def nested_lists(depth: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("tokenizer", lambda: BatchData.from_texts(None, ["a"])),  # type: ignore[arg-type]
        ("texts[1]", lambda: BatchData.from_texts(Letters(), ["a", HALF])),  # type: ignore[arg-type]
        ("texts[0]", lambda: BatchData.from_texts(Letters(), [3])),  # type: ignore[arg-type, list-item]
        ("tokenizer", lambda: Datum.from_prompt_answer(None, "a", "b")),  # type: ignore[arg-type]
        ("prompt", lambda: Datum.from_prompt_answer(Letters(), 3, "b")),  # type: ignore[arg-type]
        ("answer", lambda: Datum.from_prompt_answer(Letters(), "a", HALF)),  # type: ignore[arg-type]
        ("metadata", lambda: json_object("metadata", nested(100_000))),
        ("dataset_size", lambda: PoissonSampler("a", 0.5)),  # type: ignore[arg-type]
        ("sample_rate", lambda: PoissonSampler(5, "a")),  # type: ignore[arg-type]
        ("path", lambda: TrainingConfig.from_yaml(None)),  # type: ignore[arg-type]
        ("metadata", lambda: TrainingConfig(model_ref="m", metadata=nested(65))),
        ("metadata", lambda: tg.SaveStateRequest(metadata=nested(65))),
        ("input_ids", lambda: BatchData(nested_lists(100_000))),
        ("num_completions", lambda: tg.SampleRequest(prompts=["a"] * 17, num_completions=1000)),
        ("timeout", lambda: arguments.patience("timeout", 10**400)),
        ("timeout", lambda: arguments.seconds("timeout", 10**400)),
        ("data", lambda: open_artifact(None, b"")),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_argument_is_named(field: str, wrong: Any) -> None:
    """The error says which argument, for values that only a library further down used to refuse."""
    with pytest.raises(InvalidRequestError) as caught:
        wrong()
    assert caught.value.field == field


@pytest.mark.parametrize(
    "make",
    [
        lambda: nested_lists(100_000),
        lambda: 10**5000,
        lambda: [10**5000],
        lambda: "x" * 10**6,
        lambda: list(range(10**6)),
    ],
)
def test_whatever_is_wrong_can_be_shown(make: Any) -> None:
    """A message shows the beginning of what came, however long, deep or unwritable it is."""
    assert 0 < len(checks.shown(make())) <= 60


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: call(loops.SAVE_STATE, loops.SaveStateRequest(name=HALF)),
        lambda: call(tg.FUTURE, parts={"id": HALF}),
        lambda: call(tg.FUTURES, query={"status": HALF}),
        lambda: call(loops.SAVE_STATE, {"ttl_seconds": 10**30}),
    ],
)
def test_what_cannot_be_written_is_refused_at_the_call(wrong: Any) -> None:
    """Half a surrogate pair, or an integer of more than 64 bits, never gets as far as a connection."""
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        wrong()


def test_a_misspelt_loss_input_is_refused_and_a_column_of_ones_own_is_not() -> None:
    """A loss that would quietly go without its weights is refused by name; columns that no loss knows are carried."""

    def datum(name: str) -> Datum:
        return Datum(ModelInput.from_ints([1, 2]), {name: TensorData([1.0, 1.0], "float32")})

    for name, meant in (("wieghts", "weights"), ("advantage", "advantages"), ("temperature", "temperatures")):
        with pytest.raises(InvalidRequestError, match=f"the name '{meant}'") as caught:
            losses.require_inputs("cross_entropy", [datum("weights"), datum(name)])
        assert caught.value.field == f"data[1].loss_fn_inputs.{name}"
    losses.require_inputs("cross_entropy", [datum("mask"), datum("old_logprobs"), datum("advantages")])


@pytest.mark.parametrize(
    ("kind", "wrong", "near"),
    [
        (LoRAConfig, "rnk", "rank"),
        (OptimizerConfig, "learning_rte", "learning_rate"),
        (DPConfig, "target_eps", "target_epsilon"),
        (TrainingConfig, "model", "model_ref"),
        (SamplingConfig, "max_token", "max_tokens"),
        (BatchData, "label", "labels"),
        (AdamParams, "beta_1", "beta1"),
        (SamplingParams, "max_token", "max_tokens"),
        (Datum, "model_inputs", "model_input"),
        (ModelInput, "chunk", "chunks"),
        (EncodedTextChunk, "token", "tokens"),
        (TensorData, "dtpe", "dtype"),
    ],
)
def test_a_misspelt_keyword_is_answered_with_the_nearest_name(kind: type[Any], wrong: str, near: str) -> None:
    """Whatever a caller builds refuses an unknown keyword as it refuses one in a dict: by name, and with a hint."""
    with pytest.raises(InvalidRequestError) as caught:
        kind(**{wrong: 1})
    assert caught.value.message == f"{wrong}: no field of {kind.__name__}; did you mean '{near}'?"
    assert caught.value.field == wrong
    assert near in str(caught.value.constraint)


def test_what_callers_build_is_otherwise_as_python_has_it() -> None:
    """Constructors show their own arguments, copies and pickles are equal, subclasses and ``evolve`` work."""

    class Mine(LoRAConfig):
        """A config of the caller's own."""

    assert list(inspect.signature(LoRAConfig).parameters) == [field.name for field in attrs.fields(LoRAConfig)]
    assert list(inspect.signature(TensorData).parameters) == ["data", "dtype", "shape"]
    value = LoRAConfig(rank=3)
    assert value == copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == attrs.evolve(value, alpha=32.0)
    assert Mine(rank=3).rank == 3
    for make in (lambda: attrs.evolve(value, rnk=1), lambda: Mine(rnk=1), lambda: LoRAConfig(cls=1)):  # type: ignore[call-arg]
        with pytest.raises(InvalidRequestError, match="no field of"):
            make()

    class Renamed(SamplingParams):
        def __init__(self, **named: Any) -> None:
            super().__init__(temperature=named["heat"])

    assert Renamed(heat=0.5).temperature == 0.5
    with pytest.raises(TypeError, match="model_ref"):
        TrainingConfig()  # type: ignore[call-arg]


def test_a_misspelt_key_of_a_batch_is_answered_with_the_nearest_name() -> None:
    """A batch as a dict says which of its keys is wrong, and which was probably meant."""
    with pytest.raises(InvalidRequestError, match="did you mean 'labels'") as caught:
        BatchData.of({"input_ids": [[1]], "label": [[1]]})
    assert caught.value.field == "batch.label"


@pytest.mark.parametrize("kind", [ServiceClient, loops_surface.ServiceClient])
def test_a_misspelt_argument_of_a_service_is_answered_with_the_nearest_name(kind: type[ServiceClient]) -> None:
    """As with the calls that it offers: a ``TypeError``, as Python's, that says what may have been meant."""
    with pytest.raises(TypeError, match="'time_out'; did you mean 'timeout'"):
        kind(time_out=3)  # type: ignore[call-arg]
    assert list(inspect.signature(kind).parameters)[:2] == ["api_key", "base_url"]
