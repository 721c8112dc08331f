"""A digest that tells two base models apart: the config, and of each weight its name, dtype, shape and a sample.

Hashing whole weights would cost seconds per gigabyte at each start. Training changes weights densely, so a sample of
each tensor differs too. It identifies models; it does not authenticate them.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["of"]

_SAMPLE = 4096
_UNRELATED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


def of(model: PreTrainedModel) -> str:
    """Digest ``model`` as ``sha256:<hex>``; the same model loaded elsewhere in the same dtype gives the same."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _UNRELATED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(_sample(tensor))
    return f"sha256:{digest.hexdigest()}"


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // _SAMPLE)
    chosen = flat[::stride].contiguous().cpu()
    return chosen.view(torch.uint8).numpy().tobytes() if chosen.numel() else b""
