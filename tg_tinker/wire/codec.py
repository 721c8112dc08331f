"""The one converter between values and JSON: exact on writing, tolerant on reading.

* numpy arrays are written as JSON numbers straight from memory (orjson), never by way of Python lists;
* unknown keys are ignored on reading, except in configs, whose fields are refused with the nearest known name; a value
  with fields comes from an object and a tuple from a list, and from nothing else;
* faults are reported all together in ``InvalidRequestError.problems``: ``"message @ $.data[3].model_input"``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache, partial
from types import GenericAlias
from typing import Any, TypeVar, cast, get_args, get_origin

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import checks, config
from tg_tinker.types.batch import BatchData
from tg_tinker.types.loops import Datum, EncodedTextChunk, ModelInput
from tg_tinker.types.loops_results import LoraAdapterConfig
from tg_tinker.types.tensor import TensorData

T = TypeVar("T")

_CONFIGS = (
    config.TrainingConfig,
    config.LoRAConfig,
    config.OptimizerConfig,
    config.DPConfig,
    config.SamplingConfig,
)
_EXPECTED = re.compile(r"(?s)expected (.*?)(?:, got |: |$)")
_NESTED_PATH = re.compile(r"(?s)(.*) @ \$(\S*) @ \$(\S*)")


def dumps(value: object) -> bytes:
    """JSON bytes of any value of ``types`` or ``wire``, or of plain data holding them."""
    import orjson

    return orjson.dumps(_converter().unstructure(value), option=orjson.OPT_SERIALIZE_NUMPY)


def embedded(body: bytes) -> object:
    """JSON that is encoded already, to stand inside a value that is about to be: it is written as it is."""
    import orjson

    return orjson.Fragment(body)


def loads(body: bytes) -> Any:
    """Plain data of JSON bytes; raises ``InvalidRequestError`` where they are not JSON."""
    import orjson

    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", field="body", constraint="JSON") from error


def decode(cls: type[T], data: object) -> T:
    """A checked value of plain data; raises ``InvalidRequestError`` listing every fault with its path."""
    from cattrs.errors import BaseValidationError

    try:
        return cast("T", _converter().structure(data, cls))
    except InvalidRequestError:
        raise
    except BaseValidationError as error:
        raise _explain(error) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidRequestError(f"expected a {cls.__name__}: {error}", constraint=cls.__name__) from error


def _explain(error: Exception) -> InvalidRequestError:
    from cattrs.v import transform_error

    problems = [_flatten(problem) for problem in transform_error(error, format_exception=_describe)]
    first, _, path = problems[0].rpartition(" @ $.")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"{path}: {first}{more}" if first else f"{problems[0]}{more}"
    wanted = _EXPECTED.match(first or problems[0])
    constraint = None if wanted is None else wanted[1]
    return InvalidRequestError(message, field=path or None, constraint=constraint, problems=problems)


def _describe(error: BaseException, kind: type | None) -> str:
    if isinstance(error, InvalidRequestError):
        return error.problems[0] if error.problems else error.message
    if isinstance(error, KeyError):
        return "expected a value (the field is required)"
    name = getattr(kind, "__name__", None) or "another type"
    return f"expected {name}: {error}"


def _flatten(problem: str) -> str:
    """Join the path inside a value to the path of the value: ``x @ $.b @ $.a`` becomes ``x @ $.a.b``."""
    nested = _NESTED_PATH.fullmatch(problem)
    return f"{nested[1]} @ ${nested[3]}{nested[2]}" if nested else problem


@cache
def _converter() -> Any:
    from cattrs import Converter

    converter = Converter()
    converter.register_structure_hook_factory(attrs.has, partial(_from_object, converter))
    converter.register_structure_hook_factory(_is_list, partial(_from_list, converter))
    for cls, read in _READERS.items():  # by identity: cattrs would resolve annotations that need numpy
        converter.register_structure_hook_func(partial(operator.is_, cls), read)
    for cls, read in _PRIMITIVES.items():  # by class: there cattrs has readers of its own, which convert
        converter.register_structure_hook(cls, read)
    for cls, write in _WRITERS.items():
        converter.register_unstructure_hook_func(partial(operator.is_, cls), write)
    return converter


def _from_object(converter: Any, cls: type) -> Callable[[Any, Any], Any]:
    """A reader of a class with fields; cattrs would take a list, or a text, for an object without any."""
    from cattrs.gen import make_dict_structure_fn

    read: Callable[[Any, Any], Any] = make_dict_structure_fn(cls, converter)

    def check(data: Any, _: object) -> Any:
        if not isinstance(data, Mapping):
            raise InvalidRequestError(f"expected an object with the fields of {cls.__name__}, got {checks.shown(data)}")
        return read(data, cls)

    return check


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind)[1:] == (...,)


def _from_list(converter: Any, kind: Any) -> Callable[[Any, Any], Any]:
    """A reader of a tuple; cattrs would take the letters of a text, or the names of an object, for its items."""
    items = GenericAlias(list, get_args(kind)[0])

    def check(data: Any, _: object) -> Any:
        if not isinstance(data, list | tuple):
            raise InvalidRequestError(f"expected a list, got {checks.shown(data)}")
        return tuple(converter.structure(data, items))

    return check


def _build(data: Any, cls: type[T]) -> T:
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        raise InvalidRequestError(f"expected the fields of a {cls.__name__}, got {checks.shown(data)}")
    return checks.build(cls, data)


def _known(data: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise InvalidRequestError(f"expected an object with {', '.join(names)}, got {checks.shown(data)}")
    return {name: data[name] for name in names if name in data}


def _text_chunk(data: Any, _: object) -> EncodedTextChunk:
    if not isinstance(data, Mapping) or data.get("type", "encoded_text") != "encoded_text":
        raise InvalidRequestError("expected an encoded_text chunk; the models served here take text only", field="type")
    return EncodedTextChunk(data.get("tokens"))


def _model_input(data: Any, _: object) -> ModelInput:
    chunks = _known(data, ("chunks",)).get("chunks")
    if not isinstance(chunks, list):
        raise checks.refuse("chunks", "a list of chunks", chunks)
    return ModelInput(_each(EncodedTextChunk, chunks, "chunks"))


def _datum(data: Any, _: object) -> Datum:
    fields = _known(data, ("model_input", "loss_fn_inputs", "routed_experts_ref"))
    if fields.get("routed_experts_ref") is not None:
        wanted = "null: the models served here route no experts"
        raise checks.refuse("routed_experts_ref", wanted, fields["routed_experts_ref"])
    tensors = fields.get("loss_fn_inputs")
    tensors = {} if tensors is None else tensors
    if not isinstance(tensors, Mapping):
        raise checks.refuse("loss_fn_inputs", "an object of tensors", tensors)
    named = {}
    for name, tensor in tensors.items():
        try:
            named[str(name)] = decode(TensorData, tensor)
        except InvalidRequestError as error:
            raise checks.located(error, f"loss_fn_inputs.{name}") from error
    try:
        model_input = decode(ModelInput, fields.get("model_input"))
    except InvalidRequestError as error:
        raise checks.located(error, "model_input") from error
    return Datum(model_input, named)


def _each(cls: type[T], items: list[Any], at: str) -> tuple[T, ...]:
    values = []
    for index, item in enumerate(items):
        try:
            values.append(decode(cls, item))
        except InvalidRequestError as error:
            raise checks.located(error, f"{at}[{index}]") from error
    return tuple(values)


def _tensor(data: Any, _: object) -> TensorData:
    fields = _known(data, ("data", "dtype", "shape"))
    if "data" not in fields:
        raise checks.refuse("data", "the tensor's values", None)
    return TensorData(**fields)


def _adapter_config(data: Any, _: object) -> LoraAdapterConfig:
    """Published control planes call the rank ``r``."""
    fields = _known(data, ("r", "rank"))
    if not fields:
        raise checks.refuse("rank", "the adapter's rank", None)
    return LoraAdapterConfig(rank=decode(int, fields.get("rank", fields.get("r"))))


def _strict(kind: type, *taken: type) -> Callable[[Any, Any], Any]:
    """A reader of a JSON primitive that takes nothing else for it: "false" is not a bool, 1.5 not an int."""

    def read(data: Any, _: object) -> Any:
        if type(data) not in taken:
            raise InvalidRequestError(f"expected {kind.__name__}, got {checks.shown(data)}", constraint=kind.__name__)
        return kind(data)

    return read


def _plain_batch(batch: BatchData) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def _plain_tensor(tensor: TensorData) -> dict[str, Any]:
    return {"data": tensor.array.ravel(), "dtype": tensor.dtype, "shape": tensor.shape}


def _plain_chunk(chunk: EncodedTextChunk) -> dict[str, Any]:
    return {"type": "encoded_text", "tokens": chunk.array}


_READERS: dict[type, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(_CONFIGS, _build),
    BatchData: lambda data, _: BatchData.of(data, at=""),
    TensorData: _tensor,
    EncodedTextChunk: _text_chunk,
    ModelInput: _model_input,
    Datum: _datum,
    LoraAdapterConfig: _adapter_config,
    datetime: lambda text, _: datetime.fromisoformat(text),
}
_PRIMITIVES: dict[type, Callable[[Any, Any], Any]] = {
    bool: _strict(bool, bool),
    int: _strict(int, int),
    float: _strict(float, float, int),
    str: _strict(str, str),
}
_WRITERS: dict[type, Callable[[Any], Any]] = {
    **dict.fromkeys(_CONFIGS, attrs.asdict),
    BatchData: _plain_batch,
    TensorData: _plain_tensor,
    EncodedTextChunk: _plain_chunk,
    datetime: datetime.isoformat,
}
