"""Load a base model by hub id, local folder or built-in name, frozen and ready to carry adapters.

Nothing is ever made up: what cannot be loaded completely is a ``ResourceNotFoundError``. No code from a model
repository is run, and weights come from safetensors only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tg_tinker.engine import memory
from tg_tinker.engine.lora import lora_linear
from tg_tinker.engine.models import fingerprint, hub, models_home, tiny
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BaseModel", "load"]

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_UNBOUNDED = 1 << 20


@attrs.frozen(eq=False)
class BaseModel:
    """A frozen model that many runs share, with what the engine needs to know about it."""

    name: str  # as asked for
    model: PreTrainedModel  # frozen, in eval mode, adapters installed
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    vocab_size: int  # rows of the embedding: every token id below it is valid
    max_length: int  # tokens
    eos_token_ids: frozenset[int]
    digest: str  # "sha256:..." of config and weights


def load(
    ref: str,
    *,
    home: Path,
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> BaseModel:
    """Load ``ref``: a hub id, a local folder, ``tg-tinker/tiny`` or ``tg-tinker/smollm2-135m``.

    ``auto`` means bf16 on a GPU where there is one, else fp32 on the CPU.

    Raises ``ResourceNotFoundError`` when the model is unknown, unreachable, incomplete or damaged (the message says
    what to do), ``InvalidRequestError`` when there is no such device or dtype, ``ServerError`` when memory runs out.
    """
    place = find_device(device)
    number = _dtype(dtype, place)
    report = progress or _silent
    with memory.guard(f"loading {ref}", "choose a smaller model, or free memory on this machine"):
        report(f"loading {ref}")
        model, tokenizer = _read(ref, home, number, report)
        report(f"moving {ref} to {place}")
        nn.Module.to(model, device=place)
    model.requires_grad_(False).eval()  # noqa: FBT003 - torch's own signature
    lora_linear.install(model)
    return BaseModel(
        name=ref,
        model=model,
        tokenizer=tokenizer,
        device=place,
        dtype=number,
        vocab_size=cast("nn.Embedding", model.get_input_embeddings()).num_embeddings,
        max_length=_max_length(model.config),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        digest=fingerprint.of(model),
    )


def _read(
    ref: str, home: Path, dtype: torch.dtype, report: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if ref == models_home.TINY:
        return tiny.make_model(dtype), tiny.make_tokenizer()
    if ref.startswith("tg-tinker/"):
        return _from_pretrained(ref, models_home.cached_folder(home, ref), dtype)
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return _from_pretrained(ref, folder, dtype)
    if folder.is_absolute() or ref.startswith((".", "~")):
        message = f"there is no folder {folder}; give a folder with config.json and safetensors, or a hub id"
        raise ResourceNotFoundError(message, resource_type="model", resource_id=ref)
    if hub.reachable():
        report(f"reading {ref} from the hub")
        return _from_pretrained(ref, ref, dtype)
    report(f"no hub: looking for {ref} among the models fetched before")
    return _from_pretrained(ref, _fetched(ref), dtype)


def _fetched(ref: str) -> Path:
    try:
        return hub.fetched(ref)
    # The library has many words for "not there", and some for names that no repository can have.
    except Exception as error:
        message = (
            f"{ref!r} was not fetched before, and the hub cannot be reached; "
            "check the name and the network, or give a local folder"
        )
        raise ResourceNotFoundError(message, resource_type="model", resource_id=ref) from error


def _from_pretrained(
    ref: str, source: Path | str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Let transformers read ``source``, and refuse a model whose weights are not all there."""
    try:
        tokenizer = cast("Any", AutoTokenizer.from_pretrained)(source, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    # As wide as it gets: hub, network, JSON, safetensors and architecture code each raise classes of their own.
    except Exception as error:
        if memory.is_exhausted(error):
            raise
        raise ResourceNotFoundError(_advice(ref, source, error), resource_type="model", resource_id=ref) from error
    model, report = cast("tuple[PreTrainedModel, Mapping[str, Any]]", loaded)
    lost = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lost:
        message = f"{ref} is damaged: {len(lost)} weights are missing or misshapen, the first is {lost[0]}"
        raise ResourceNotFoundError(message, resource_type="model", resource_id=ref)
    return model, tokenizer


def _advice(ref: str, source: Path | str, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(source, Path):
        return f"cannot load {ref} from {source}: {reason}; it needs config.json, a tokenizer and *.safetensors"
    return f"cannot load {ref!r} from the hub: {reason}; check the name and the network, or give a local folder"


def find_device(device: str) -> torch.device:
    """The device of that name; raises ``InvalidRequestError`` where there is none here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    # torch raises RuntimeError, AssertionError or NotImplementedError, depending on the device type.
    except Exception as error:
        message = f"device {device!r} is not available here"
        raise InvalidRequestError(message, field="device", constraint="auto, cpu, or a GPU of this machine") from error
    return place


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    number = _DTYPES.get(dtype)
    if number is None or (number is torch.float16 and device.type == "cpu"):
        constraint = "auto, float32, bfloat16, float64, or float16 on a GPU"
        message = f"dtype {dtype!r} cannot be used on {device.type}"
        raise InvalidRequestError(message, field="dtype", constraint=constraint)
    return number


def _max_length(config: Any) -> int:
    text = config.get_text_config()
    return next((int(value) for key in _LENGTH_KEYS if (value := getattr(text, key, None))), _UNBOUNDED)


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Collect the ids that end a text, from generation config, model config and tokenizer."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or ())
    return frozenset(found)


def _silent(_stage: str) -> None:
    """Report to nobody."""
