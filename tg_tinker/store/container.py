"""What is inside a sealed artifact: safetensors with one metadata key of canonical JSON.

Equal states give equal bytes. Never pickle. Reading needs no torch.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from tg_tinker.wire.digest import canonical_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from torch import Tensor

METADATA_KEY = "tg"


def pack(tensors: Mapping[str, Tensor | np.ndarray[Any, Any]], counters: Mapping[str, Any]) -> bytes:
    """Serialize named tensors and JSON counters; reproducible, because safetensors keeps the order of one key only."""
    import safetensors.torch
    import torch

    plain: dict[str, Tensor] = {}
    for name in sorted(tensors):
        value = tensors[name]
        tensor = value.detach().to("cpu") if isinstance(value, torch.Tensor) else torch.tensor(value)
        plain[name] = tensor.clone(memory_format=torch.contiguous_format)  # no two names may share memory
    metadata = {METADATA_KEY: canonical_json(dict(counters)).decode()}
    return safetensors.torch.save(plain, metadata)


def unpack(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read verified bytes back as tensors and counters."""
    import safetensors.torch

    return dict(safetensors.torch.load(content)), read_counters(content)


def unpack_arrays(content: bytes) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Read verified bytes back as numpy arrays (bfloat16 as float32, exactly) and counters."""
    import numpy as np
    import safetensors

    arrays: dict[str, np.ndarray[Any, Any]] = {}
    deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize
    for name, spec in deserialize(content):
        raw, shape = bytes(spec["data"]), spec["shape"]
        if spec["dtype"] == "BF16":
            wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
            arrays[name] = wide.view(np.float32).reshape(shape)
        else:
            arrays[name] = np.frombuffer(raw, _numpy_dtype(spec["dtype"])).reshape(shape).copy()
    return arrays, read_counters(content)


def read_counters(content: bytes) -> dict[str, Any]:
    """Read the JSON counters from the safetensors header (8 bytes of length, then JSON)."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return cast("dict[str, Any]", json.loads(header["__metadata__"][METADATA_KEY]))


def _numpy_dtype(name: str) -> str:
    if name == "BOOL":
        return "?"
    return f"<{name[0].lower()}{int(name[1:]) // 8}"
