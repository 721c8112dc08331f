"""A digest that tells two base models apart: the config, and of each weight its name, shape and a sample.

Hashing whole weights would cost seconds per gigabyte at each start. Training changes weights densely, so a sample of
each tensor differs too; it is taken in bfloat16, for fp32 on a CPU and bf16 on a GPU are one model. It identifies
models; it does not authenticate them.
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
    """Digest ``model`` as ``sha256:<hex>``; the same model loaded elsewhere, in fp32 or bf16, gives the same."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _UNRELATED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}\n".encode())
        digest.update(_sample(tensor))
    return f"sha256:{digest.hexdigest()}"


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // _SAMPLE)
    chosen = flat[::stride].contiguous().cpu()
    chosen = chosen.bfloat16() if chosen.is_floating_point() else chosen
    return chosen.view(torch.uint8).numpy().tobytes() if chosen.numel() else b""
