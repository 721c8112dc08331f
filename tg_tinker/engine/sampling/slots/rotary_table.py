"""Rotary position embedding from a table: the angles are the model's own, computed once for each position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RotaryTable", "rotate"]

_BLOCK = 1024  # positions by which the table grows


class RotaryTable:
    """Cosines and sines by position, made by the model's own rotary module, so that any scaling is its own."""

    def __init__(self, module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self._module = module
        self._like = torch.empty(1, device=device, dtype=dtype)
        self._cos = self._sin = torch.empty(0, device=device, dtype=dtype)

    def at(self, positions: Tensor, highest: int) -> tuple[Tensor, Tensor]:
        """Give cosines and signed sines (N, 1, head size) of ``positions`` (N,), none above ``highest``."""
        if highest >= len(self._cos):
            self._grow(highest)
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def _grow(self, highest: int) -> None:
        size = (highest // _BLOCK + 1) * _BLOCK
        cos, sin = self._module(self._like, torch.arange(size, device=self._like.device)[None])
        half = sin.shape[-1] // 2
        self._cos, self._sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``heads`` (N, H, head size) in place by their angles; ``sin`` carries the sign of the first half.

    Source: Su et al., arXiv:2104.09864, section 3.4.2, in the half-split layout of GPT-NeoX.
    """
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return heads.mul_(cos).addcmul_(swapped, sin)
