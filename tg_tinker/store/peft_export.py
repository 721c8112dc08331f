"""Export an adapter as a plain peft folder that ``PeftModel.from_pretrained`` loads. Nothing in it is sealed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.store import files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

_PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight")


def export_peft(
    folder: Path,
    tensors: Mapping[str, Tensor | np.ndarray[Any, Any]],
    *,
    base_model: str,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; what is no weight of the adapter is left out.

    ``tensors`` are in peft naming: ``base_model.model.<layer>.lora_A.weight`` of shape (rank, in), B of (out, rank),
    ``base_model.model.<module>.weight`` where a module was trained whole. Raises ``InvalidRequestError`` where none is
    a LoRA weight.
    """
    weights = {name: value for name, value in tensors.items() if name.startswith(_PREFIX)}
    names = [name.removeprefix(_PREFIX) for name in weights]
    layers = sorted({name.rsplit(".", 2)[0] for name in names if name.endswith(_ENDS)})
    if not layers:
        raise InvalidRequestError("tensors: expected LoRA weights in peft naming", field="tensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(target_modules or {layer.rsplit(".", 1)[-1] for layer in layers}),
        # by their full names: peft takes every module whose name merely ends so
        "modules_to_save": sorted({name.rsplit(".", 1)[0] for name in names if not name.endswith(_ENDS)}) or None,
    }
    files.make_folder(folder)
    files.write(folder / "adapter_model.safetensors", _serialized(weights))
    files.write(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True).encode())
    return folder


def _serialized(weights: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> bytes:
    """Write safetensors; arrays need no torch, so that an artifact can be exported where there is none."""
    import numpy as np
    import safetensors.numpy

    arrays = {name: np.ascontiguousarray(value) for name, value in weights.items() if isinstance(value, np.ndarray)}
    if len(arrays) == len(weights):
        return safetensors.numpy.save(arrays, {"format": "pt"})
    import safetensors.torch
    import torch

    tensors = {name: torch.as_tensor(value).detach().cpu().contiguous() for name, value in weights.items()}
    return safetensors.torch.save(tensors, {"format": "pt"})
