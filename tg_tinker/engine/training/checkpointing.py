"""Gradient checkpointing of a shared base model, switched on for one pass and off again.

A layer's activations are dropped and computed again in the backward pass. Dropout masks are drawn from seeds, so the
second forward is the first one, and torch's random state need not be kept.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from torch import nn

    from tg_tinker.engine.models.base_model import BaseModel

__all__ = ["checkpointed", "require_support"]


def require_support(base: BaseModel) -> None:
    """Raise ``InvalidRequestError`` when the architecture has nothing that could be checkpointed."""
    if not base.model.supports_gradient_checkpointing or not _layers(base):
        message = f"{base.name} does not support gradient checkpointing"
        raise InvalidRequestError(message, field="gradient_checkpointing", constraint="False for this model")


@contextmanager
def checkpointed(base: BaseModel) -> Generator[None]:
    """Checkpoint every layer that can be, for the passes inside the block."""
    layers = _layers(base)
    try:
        for layer in layers:
            # transformers checkpoints only layers in training mode, and asks before it calls them.
            layer.training, layer.gradient_checkpointing = True, True
            layer._gradient_checkpointing_func = partial(_checkpoint, layer)
        yield
    finally:
        for layer in layers:
            layer.training, layer.gradient_checkpointing = False, False


def _checkpoint(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(partial(_without_dropout, layer, forward), *args, use_reentrant=False, preserve_rng_state=False)


def _without_dropout(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """Call the layer out of training mode: some drop out by themselves, and would draw another mask the second time."""
    layer.training = False
    try:
        return forward(*args)
    finally:
        layer.training = True


def _layers(base: BaseModel) -> list[Any]:
    modules = cast("Iterable[nn.Module]", base.model.modules())
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
