"""What goes into the operations of the Loops surface: datums, model input, optimizer and sampling parameters.

Field names, defaults and meanings are those of the Loops pages (SDK 0.32); each value checks itself when it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import arguments, arrays, checks
from tg_tinker.types.tensor import TensorData
from tg_tinker.types.tokens import encode, end_of_text
from tg_tinker.types.value import Input, Value

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

LossName = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "dppo", "dpo"]

MOST_STOPS = 1024  # that end one completion: each is looked for at every token


def token_ids(value: object, field: str) -> NDArray[np.int64]:
    """Token ids as an int64 array, ``(positions,)``. Raises ``InvalidRequestError`` naming ``field``."""
    array = arrays.whole_numbers(value, field)
    if array.ndim != 1 or (array < 0).any():
        raise checks.refuse(field, "a flat list of token ids of at least 0", value)
    return array


@attrs.frozen(eq=False, init=False, repr=False)
class EncodedTextChunk(Input):
    """Token ids, ``(positions,)``, as int64."""

    array: NDArray[np.int64]

    def __init__(self, tokens: object) -> None:
        checks.assign(self, array=token_ids(tokens, "tokens"))

    @property
    def tokens(self) -> list[int]:
        """The token ids as a list."""
        return cast("list[int]", self.array.tolist())

    @property
    def length(self) -> int:
        """How many positions the chunk takes."""
        return int(self.array.size)

    def to_dict(self) -> dict[str, Any]:
        """The chunk as it crosses the wire."""
        return {"type": "encoded_text", "tokens": self.tokens}

    def __eq__(self, other: object) -> bool:
        """Equal token ids."""
        return isinstance(other, EncodedTextChunk) and self.tokens == other.tokens

    def __hash__(self) -> int:
        """By the token ids."""
        return hash(self.array.tobytes())

    def __repr__(self) -> str:
        """How many tokens, and the first of them."""
        return f"EncodedTextChunk({checks.shown(self.tokens)})"


def _chunks(chunks: Sequence[EncodedTextChunk]) -> tuple[EncodedTextChunk, ...]:
    if not isinstance(chunks, Sequence):
        raise checks.refuse("chunks", "a list of EncodedTextChunk", chunks)
    return tuple(chunks)


def _are_text(_: object, __: object, chunks: tuple[object, ...]) -> None:
    for index, chunk in enumerate(chunks):
        if not isinstance(chunk, EncodedTextChunk):
            raise checks.refuse(f"chunks[{index}]", "an EncodedTextChunk (text only)", chunk)


@attrs.frozen
class ModelInput(Input):
    """A prompt as chunks of tokens. Text only: the models served here take no images."""

    chunks: tuple[EncodedTextChunk, ...] = attrs.field(default=(), converter=_chunks, validator=_are_text)

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | NDArray[np.int64]) -> ModelInput:
        """One chunk of the given token ids."""
        return cls((EncodedTextChunk(tokens),))

    @classmethod
    def empty(cls) -> ModelInput:
        """No tokens yet; ``append`` and ``append_int`` give longer ones."""
        return cls(())

    @property
    def length(self) -> int:
        """How many positions all chunks take together."""
        return sum(chunk.length for chunk in self.chunks)

    def to_ints(self) -> list[int]:
        """All token ids in one list."""
        return cast("list[int]", self.to_numpy().tolist())

    def to_numpy(self) -> NDArray[np.int64]:
        """All token ids in one int64 array, ``(length,)``."""
        import numpy as np

        if len(self.chunks) == 1:
            return self.chunks[0].array
        return np.concatenate([np.zeros(0, np.int64), *(chunk.array for chunk in self.chunks)])

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        """A new input with one more chunk."""
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        """A new input with one more token."""
        return self.append(EncodedTextChunk([token]))

    def to_dict(self) -> dict[str, Any]:
        """The input as it crosses the wire."""
        return {"chunks": [chunk.to_dict() for chunk in self.chunks]}


def _has_tokens(_: object, __: object, value: Any) -> None:
    if not isinstance(value, ModelInput) or value.length == 0:
        raise checks.refuse("model_input", "a ModelInput of at least one token", value)


def _are_aligned(datum: Datum, _: object, inputs: object) -> None:
    if not isinstance(inputs, Mapping):
        raise checks.refuse("loss_fn_inputs", "a dict of TensorData", inputs)
    for name, tensor in inputs.items():
        field = f"loss_fn_inputs.{name}"
        if not isinstance(tensor, TensorData):
            raise checks.refuse(field, "a TensorData (TensorData.from_list makes one of a list)", tensor)
        if tensor.array.ndim not in {1, 2} or tensor.array.shape[0] != datum.model_input.length:
            raise checks.refuse(field, f"one value per input position, {datum.model_input.length}", tensor.shape)
        if name == "target_tokens":
            arrays.whole_numbers(tensor.array, field)


@attrs.frozen(eq=False)
class Datum(Input):
    """One training example; the unit that differential privacy protects.

    Not shifted: position i of ``model_input`` predicts ``target_tokens[i]``, and every tensor in ``loss_fn_inputs`` is
    aligned with it, ``(N,)`` (or ``(N, K)`` targets and weights for cross_entropy). -100 ignores a position. Without
    ``target_tokens`` the input's own next tokens are the targets and the last position is ignored.

    Raises ``InvalidRequestError`` naming the tensor whose length is not that of the input.
    """

    model_input: ModelInput = attrs.field(validator=_has_tokens)
    loss_fn_inputs: Mapping[str, TensorData] = attrs.field(factory=dict, validator=_are_aligned)

    @classmethod
    def from_prompt_answer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | Sequence[int],
        answer: str | Sequence[int],
        *,
        max_length: int | None = None,
    ) -> Datum:
        """A supervised example that learns the answer and ignores the prompt; the end-of-text token is learnt too.

        ``max_length`` (tokens) cuts the end. The texts are encoded apart, so the prompt is tokenized as for sampling.
        """
        longest = None if max_length is None else arguments.whole("max_length", max_length, 1)
        end = end_of_text(tokenizer)
        head = _tokens(tokenizer, "prompt", prompt)
        tail = [*_tokens(tokenizer, "answer", answer, special=False), *(end if isinstance(answer, str) else ())]
        for field, ids in (("prompt", head), ("answer", tail)):
            if not ids:
                raise checks.refuse(field, "at least one token", ids)
        tokens = [*head, *tail][:longest]
        targets = [-100] * (len(head) - 1) + tokens[len(head) :]
        if not tokens[len(head) :]:
            raise checks.refuse("max_length", f"room for the prompt's {len(head)} tokens and some answer", max_length)
        return cls(ModelInput.from_ints(tokens[:-1]), {"target_tokens": TensorData(targets, "int64")})

    def to_dict(self) -> dict[str, Any]:
        """The datum as it crosses the wire."""
        inputs = {name: tensor.to_dict() for name, tensor in self.loss_fn_inputs.items()}
        return {"model_input": self.model_input.to_dict(), "loss_fn_inputs": inputs}


@attrs.frozen(kw_only=True)
class AdamParams(Input, Value):
    """AdamW for one step (Loshchilov & Hutter 2019, arXiv:1711.05101). ``grad_clip_norm`` 0 switches clipping off."""

    learning_rate: float = attrs.field(default=1e-4, validator=checks.number(0.0))
    beta1: float = attrs.field(default=0.9, validator=checks.number(0.0, 1.0 - 1e-12))
    beta2: float = attrs.field(default=0.95, validator=checks.number(0.0, 1.0 - 1e-12))
    eps: float = attrs.field(default=1e-12, validator=checks.number(0.0))
    weight_decay: float = attrs.field(default=0.0, validator=checks.number(0.0))
    grad_clip_norm: float = attrs.field(default=1.0, validator=checks.number(0.0))


def _stops(_: object, __: object, value: Any) -> None:
    items = (value,) if isinstance(value, str) else value
    if items is None:
        return
    if not isinstance(items, tuple) or {type(item) for item in items} not in ({str}, {int}, set[type]()):
        raise checks.refuse("stop", "a string, a list of strings, or a list of token ids", value)
    if any(item == "" or (isinstance(item, int) and item < 0) for item in items):
        raise checks.refuse("stop", "non-empty strings or token ids of at least 0", value)
    if len(items) > MOST_STOPS:
        raise checks.refuse("stop", f"at most {MOST_STOPS} strings or token ids", value)


@attrs.frozen(kw_only=True)
class SamplingParams(Input, Value):
    """How to sample. ``top_k`` -1 is off, ``temperature`` 0 is greedy, ``max_tokens`` None means all room that is left.

    ``stop``: a text, texts, or token ids. ``seed`` None draws a new one for each call.
    """

    max_tokens: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(1)))
    seed: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(0, 2**63 - 1)))
    stop: str | tuple[str, ...] | tuple[int, ...] | None = attrs.field(
        default=None, converter=checks.tupled, validator=_stops
    )
    temperature: float = attrs.field(default=1.0, validator=checks.number(0.0))
    top_k: int = attrs.field(default=-1, validator=checks.integer(-1))
    top_p: float = attrs.field(default=1.0, validator=checks.number(above=0.0, high=1.0))


def datums(data: object) -> tuple[Datum, ...]:
    """The datums of a call, checked: a non-empty sequence of nothing but ``Datum``."""
    if isinstance(data, Datum) or not isinstance(data, Sequence) or not data:
        raise checks.refuse("data", "a non-empty list of Datum", data)
    for index, datum in enumerate(data):
        if not isinstance(datum, Datum):
            raise checks.refuse(f"data[{index}]", "a Datum", datum)
    return tuple(data)


def prompt_of(prompt: object) -> ModelInput:
    """A prompt for sampling: a ``ModelInput`` (or a plain list of token ids) of at least one token."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        try:
            prompt = ModelInput.from_ints(prompt)
        except InvalidRequestError as error:
            raise checks.located(error, "prompt") from error
    if not isinstance(prompt, ModelInput) or not prompt.length:
        raise checks.refuse("prompt", "a ModelInput of at least one token", prompt)
    return prompt


def _tokens(tokenizer: PreTrainedTokenizerBase, field: str, given: object, *, special: bool = True) -> list[int]:
    """The tokens of a text, or those given."""
    if isinstance(given, str):
        return encode(tokenizer, field, given, special=special)
    if not isinstance(given, Iterable):
        raise checks.refuse(field, "a string, or token ids", given)
    return list(given)
