"""The Loops inputs: ModelInput, Datum, AdamParams, SamplingParams, and the checks a call makes on lists of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import loops, losses
from tg_tinker.types.loops import AdamParams, Datum, EncodedTextChunk, ModelInput, SamplingParams
from tg_tinker.types.tensor import TensorData


class Words:
    """A tokenizer of one id per character."""

    eos_token_id = 7

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(character) for character in text]


def _ints(*values: int) -> TensorData:
    return TensorData(list(values), "int64")


def test_a_model_input_grows_without_changing() -> None:
    """Appending gives a longer input and leaves the first as it was."""
    first = ModelInput.from_ints([1, 2])
    longer = first.append(EncodedTextChunk([3])).append_int(4)
    assert (first.to_ints(), longer.to_ints(), longer.length) == ([1, 2], [1, 2, 3, 4], 4)
    assert longer.to_numpy().tolist() == [1, 2, 3, 4]
    assert (ModelInput.empty().length, ModelInput.empty().to_ints()) == (0, [])
    assert longer == ModelInput([EncodedTextChunk([1, 2]), EncodedTextChunk([3]), EncodedTextChunk([4])])
    assert hash(first) == hash(ModelInput.from_ints(np.array([1, 2])))


@pytest.mark.parametrize("tokens", [[1, -1], [[1]], [1.5], "text", [None], 5, [2.0**63]], ids=str)
def test_tokens_must_be_a_flat_list_of_ids(tokens: Any) -> None:
    """Negative, nested, fractional, endless or textual tokens, and a single number, are refused."""
    with pytest.raises(InvalidRequestError) as caught:
        ModelInput.from_ints(tokens)
    assert caught.value.field == "tokens"


@pytest.mark.parametrize(
    ("tokens", "place"), [([1, True], "tokens[1]"), ((False,), "tokens[0]"), (np.array([True]), "tokens")], ids=str
)
def test_true_and_false_are_no_tokens(tokens: Any, place: str) -> None:
    """Booleans among token ids are refused by place, although numpy would count them as 1 and 0."""
    with pytest.raises(InvalidRequestError, match="not True or False") as caught:
        ModelInput.from_ints(tokens)
    assert caught.value.field == place


def test_an_image_chunk_is_refused() -> None:
    """A chunk of another kind is named by its index."""
    with pytest.raises(InvalidRequestError) as caught:
        ModelInput([EncodedTextChunk([1]), {"type": "image"}])  # type: ignore[list-item]
    assert caught.value.field == "chunks[1]"


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"target_tokens": _ints(1)}, "loss_fn_inputs.target_tokens"),
        ({"weights": [1.0, 1.0]}, "loss_fn_inputs.weights"),
        ({"target_tokens": TensorData(1, "int64")}, "loss_fn_inputs.target_tokens"),
        ({"target_tokens": TensorData([True, False], "bool")}, "loss_fn_inputs.target_tokens"),
        ({"target_tokens": TensorData([1.5, 2.0])}, "loss_fn_inputs.target_tokens"),
        ([("weights", 1)], "loss_fn_inputs"),
    ],
    ids=str,
)
def test_a_datum_checks_that_its_tensors_fit(inputs: Any, field: str) -> None:
    """Every tensor has one value per input position, targets are whole; the error names the tensor that is wrong."""
    with pytest.raises(InvalidRequestError) as caught:
        Datum(ModelInput.from_ints([1, 2]), inputs)
    assert caught.value.field == field


@pytest.mark.parametrize("model_input", [ModelInput.empty(), [1, 2], None], ids=str)
def test_a_datum_needs_tokens(model_input: Any) -> None:
    """A datum without a model input of at least one token is refused."""
    with pytest.raises(InvalidRequestError) as caught:
        Datum(model_input)
    assert caught.value.field == "model_input"


def test_a_prompt_and_answer_are_masked_and_not_shifted() -> None:
    """Position i predicts target i; the prompt's positions but its last are ignored, the end of text is learnt."""
    datum = Datum.from_prompt_answer(Words(), "ab", "cd")  # type: ignore[arg-type]
    assert datum.model_input.to_ints() == [1, 97, 98, 99, 100]
    assert datum.loss_fn_inputs["target_tokens"].data == [-100, -100, 99, 100, 7]
    tokens = Datum.from_prompt_answer(Words(), [5, 6], [8])  # type: ignore[arg-type]
    assert tokens.model_input.to_ints() == [5, 6]
    assert tokens.loss_fn_inputs["target_tokens"].data == [-100, 8]


@pytest.mark.parametrize(
    ("prompt", "answer", "limit", "field"),
    [([], "a", None, "prompt"), ("a", [], None, "answer"), ("ab", "c", 3, "max_length")],
)
def test_an_example_needs_both_ends(prompt: Any, answer: Any, limit: int | None, field: str) -> None:
    """An empty prompt or answer, or a limit that leaves no answer, is refused."""
    with pytest.raises(InvalidRequestError) as caught:
        Datum.from_prompt_answer(Words(), prompt, answer, max_length=limit)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (AdamParams, "learning_rate", -1.0),
        (AdamParams, "learning_rate", float("nan")),
        (AdamParams, "beta1", 1.0),
        (AdamParams, "beta2", -0.1),
        (AdamParams, "eps", -1e-9),
        (AdamParams, "weight_decay", "0"),
        (AdamParams, "grad_clip_norm", -1.0),
        (SamplingParams, "max_tokens", -1),
        (SamplingParams, "max_tokens", 0),
        (SamplingParams, "temperature", -3.0),
        (SamplingParams, "temperature", float("inf")),
        (SamplingParams, "top_p", 0.0),
        (SamplingParams, "top_p", 1.5),
        (SamplingParams, "top_k", -2),
        (SamplingParams, "seed", -1),
        (SamplingParams, "stop", [""]),
        (SamplingParams, "stop", ["a", 1]),
        (SamplingParams, "stop", [-1]),
        (SamplingParams, "stop", 5),
        (SamplingParams, "stop", [True]),
        (SamplingParams, "stop", ["x"] * 1025),
    ],
)
def test_parameters_are_checked_at_construction(kind: type[Any], field: str, value: object) -> None:
    """Optimizer and sampling parameters refuse what the server could not use, by field."""
    with pytest.raises(InvalidRequestError) as caught:
        kind(**{field: value})
    assert caught.value.field == field


def test_the_defaults_are_those_of_loops() -> None:
    """AdamParams and SamplingParams default to the published values."""
    assert AdamParams().to_dict() == {
        "learning_rate": 1e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-12,
        "weight_decay": 0.0,
        "grad_clip_norm": 1.0,
    }
    assert SamplingParams(stop=["a"]).to_dict() == {
        "max_tokens": None,
        "seed": None,
        "stop": ["a"],
        "temperature": 1.0,
        "top_k": -1,
        "top_p": 1.0,
    }


@pytest.mark.parametrize(
    ("data", "field"),
    [([], "data"), (None, "data"), ("x", "data[0]"), (Datum(ModelInput.from_ints([1])), "data"), ([3], "data[0]")],
    ids=str,
)
def test_the_data_of_a_call_is_a_list_of_datums(data: Any, field: str) -> None:
    """An empty list, a single datum and something else among them are refused."""
    with pytest.raises(InvalidRequestError) as caught:
        loops.datums(data)
    assert caught.value.field == field


def test_a_prompt_is_a_model_input_or_a_list_of_ids() -> None:
    """Both forms of prompt are taken; text, nothing and negative ids are refused."""
    assert loops.prompt_of([1, 2]) == ModelInput.from_ints([1, 2])
    for wrong, field in (
        ("text", "prompt"),
        (ModelInput.empty(), "prompt"),
        ([-1], "prompt.tokens"),
        (None, "prompt"),
        ([], "prompt"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            loops.prompt_of(wrong)
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("loss", "config", "field"),
    [
        ("nope", None, "loss_fn"),
        (None, None, "loss_fn"),
        ("ppo", {"clip": 1.0}, "loss_fn_config.clip"),
        ("ppo", {"clip_low_threshold": float("nan")}, "loss_fn_config.clip_low_threshold"),
        ("dro", {"beta": "0.1"}, "loss_fn_config.beta"),
        ("dro", {"beta": True}, "loss_fn_config.beta"),
        ("dro", {"beta": 10**400}, "loss_fn_config.beta"),
        ("cross_entropy", {"skip_token_normalization": 2}, "loss_fn_config.skip_token_normalization"),
        ("cross_entropy", {"skip_token_normalization": "no"}, "loss_fn_config.skip_token_normalization"),
        ("importance_sampling", [("a", 1)], "loss_fn_config"),
    ],
)
def test_losses_and_their_settings_are_checked(loss: Any, config: Any, field: str) -> None:
    """An unknown loss, an unknown key and a value that is no number are refused with what is allowed."""
    with pytest.raises(InvalidRequestError) as caught:
        losses.settings(loss, config)
    assert caught.value.field == field


def test_settings_are_filled_with_defaults() -> None:
    """A loss's config takes its defaults where the caller is silent."""
    assert losses.settings("ppo", {"clip_low_threshold": 0.9}) == {
        "clip_low_threshold": 0.9,
        "clip_high_threshold": 1.2,
    }
    assert losses.settings("cross_entropy", None) == {"skip_token_normalization": False}
    assert losses.settings("cross_entropy", {"skip_token_normalization": 1.0}) == {"skip_token_normalization": True}


@pytest.mark.parametrize("loss", [name for name, spec in losses.LOSSES.items() if spec.required])
def test_a_missing_tensor_is_named_by_datum(loss: str) -> None:
    """The error names the datum and the first tensor that its loss needs and it lacks."""
    tensors = {name: TensorData([1.0], "float32") for name in losses.LOSSES[loss].required}
    good = Datum(ModelInput.from_ints([1]), tensors)
    lacking = losses.LOSSES[loss].required[-1]
    bad = Datum(ModelInput.from_ints([1]), {name: tensor for name, tensor in tensors.items() if name != lacking})
    losses.require_inputs(loss, [good, good])
    with pytest.raises(InvalidRequestError) as caught:
        losses.require_inputs(loss, [good, good, good, bad])
    assert caught.value.field == f"data[3].loss_fn_inputs.{lacking}"
    assert caught.value.problems[0].endswith(f"@ $.data[3].loss_fn_inputs.{lacking}")


def test_dpo_takes_pairs() -> None:
    """An odd number of datums cannot be pairs."""
    tensors = {name: TensorData([1.0]) for name in losses.LOSSES["dpo"].required}
    with pytest.raises(InvalidRequestError) as caught:
        losses.require_inputs("dpo", [Datum(ModelInput.from_ints([1]), tensors)] * 3)
    assert caught.value.field == "data"
