"""Tensors of one micro-batch: right-padded tokens, and of each labelled position its target and loss inputs, flat.

Padding sits behind a row, where causal attention never looks, so no attention mask is needed. Only labelled positions
reach the output head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor

from tg_tinker.engine.training.losses import active_positions
from tg_tinker.types.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tg_tinker.engine.training.batching import Row
    from tg_tinker.engine.training.losses import Inputs, Loss

__all__ = ["MicroBatch", "collate", "scatter"]


@attrs.frozen(eq=False)
class MicroBatch:
    """What one pass through the model needs. M counts the labelled positions of all rows, row after row."""

    tokens: Tensor  # (rows, width), int64
    positions: Tensor  # (M,): where they stand in the flattened tokens
    targets: Tensor  # (M,) or (M, K), int64, 0 where inactive
    mask: Tensor  # like targets, bool: the targets that enter the loss
    inputs: Inputs  # each like targets, temperatures (M,); ``lengths`` (rows,): how many labelled positions each has
    active: int  # positions that enter the loss


def collate(rows: Sequence[Row], loss: Loss, *, device: torch.device, dtype: torch.dtype) -> MicroBatch:
    """Build the tensors of ``rows`` on ``device``; loss inputs in ``dtype``."""
    width = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
    chosen = [row.labelled.nonzero()[0] for row in rows]
    positions = np.concatenate([index * width + places for index, places in enumerate(chosen)])
    targets = np.concatenate([row.targets[places] for row, places in zip(rows, chosen, strict=True)])
    mask = np.concatenate([active_positions(loss, row)[places] for row, places in zip(rows, chosen, strict=True)])
    inputs = {
        name: torch.from_numpy(values).to(device, dtype)
        for name in loss.input_names
        if (values := _gathered(rows, chosen, name)) is not None
    }
    inputs["lengths"] = torch.tensor([len(places) for places in chosen])
    return MicroBatch(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(positions).to(device),
        torch.from_numpy(targets.clip(min=0)).to(device),
        torch.from_numpy(mask).to(device),
        inputs,
        int((mask if mask.ndim == 1 else mask.any(axis=1)).sum()),
    )


def _gathered(rows: Sequence[Row], chosen: Sequence[NDArray[np.int64]], name: str) -> NDArray[Any] | None:
    """Join one optional input of all rows; a row without it counts as all ones."""
    if not any(name in row.inputs for row in rows):
        return None
    shapes = [row.tokens.shape if name == "temperatures" else row.targets.shape for row in rows]
    arrays = [row.inputs.get(name, np.ones(shape)) for row, shape in zip(rows, shapes, strict=True)]
    return np.concatenate([array[places] for array, places in zip(arrays, chosen, strict=True)])


def scatter(rows: Sequence[Row], values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Spread values of labelled positions over whole rows, shaped like the targets; 0.0 everywhere else."""
    spread: list[NDArray[np.float32]] = []
    start = 0
    for row in rows:
        labelled = row.labelled
        stop = start + int(labelled.sum())
        out = np.zeros(row.targets.shape, np.float32)
        out[labelled] = values[start:stop]
        spread.append(np.where(row.targets == IGNORED, np.float32(0.0), out))
        start = stop
    return spread
