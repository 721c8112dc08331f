"""Losses that the caller computes: from the logprobs of a forward pass to the weights of a backward pass.

The server differentiates cross-entropy with weights ``-dC/dlogprob``; by the chain rule that is the gradient of C.
torch is imported only where the caller's loss uses it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.types import checks
from tg_tinker.types.loops import Datum, datums
from tg_tinker.types.loops_results import ForwardBackwardOutput
from tg_tinker.types.tensor import TensorData

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["INPUTS", "SUMMED", "CustomLoss", "check", "evaluate", "for_forward", "merged"]

#: ``(data, logprobs) -> (loss, metrics)`` with torch, ``-> (loss, gradients, metrics)`` with numpy.
CustomLoss = Callable[[Sequence[Datum], list[Any]], tuple[Any, ...]]

INPUTS = ("logprobs", "numpy")
SUMMED = {"skip_token_normalization": True}
TARGETS = "target_tokens"
IGNORED = -100


def check(data: object, loss_fn: object, loss_type_input: object) -> tuple[Datum, ...]:
    """The datums of a custom pass, checked with the arguments beside them."""
    if loss_type_input not in INPUTS:
        raise checks.refuse("loss_type_input", f"one of {', '.join(INPUTS)}", loss_type_input)
    if not callable(loss_fn):
        raise checks.refuse("loss_fn", "a function of the datums and their logprobs", loss_fn)
    checked = datums(data)
    for index, datum in enumerate(checked):
        if TARGETS not in datum.loss_fn_inputs:
            raise checks.refuse(f"data[{index}].loss_fn_inputs.{TARGETS}", "a tensor: custom losses need it", None)
    return checked


def for_forward(data: Sequence[Datum]) -> tuple[Datum, ...]:
    """The datums with nothing but their targets: whatever else they hold is for the caller's loss."""
    return tuple(Datum(datum.model_input, {TARGETS: datum.loss_fn_inputs[TARGETS]}) for datum in data)


async def evaluate(
    data: Sequence[Datum], loss_fn: CustomLoss, kind: str, seen: ForwardBackwardOutput
) -> tuple[tuple[Datum, ...], float, dict[str, float]]:
    """Run the caller's loss in a worker thread: the datums to send backward, the loss, its metrics."""
    logprobs = _logprobs_of(seen, data)
    work = _by_torch if kind == "logprobs" else _by_numpy
    loss, gradients, metrics = await asyncio.to_thread(work, data, loss_fn, logprobs)
    weighted = tuple(_weighted(index, datum, gradients[index]) for index, datum in enumerate(data))
    return weighted, loss, {str(name): float(value) for name, value in metrics.items()}


def merged(done: ForwardBackwardOutput, loss: float, metrics: Mapping[str, float]) -> ForwardBackwardOutput:
    """The backward pass's output, with the caller's loss and metrics in place of the surrogate's."""
    return attrs.evolve(done, loss=loss, metrics={**done.metrics, "loss": loss, "loss:sum": loss, **metrics})


def _logprobs_of(seen: ForwardBackwardOutput, data: Sequence[Datum]) -> list[NDArray[Any]]:
    """What the caller's loss starts from; older trainers say nothing (NaN) where there is no target."""
    if not seen.metrics.get("skip_token_normalization"):  # such a trainer would divide the caller's gradient by a count
        raise ServerError("the trainer does not say that it leaves sums undivided", code="BAD_ANSWER")
    found = [outputs["logprobs"].to_numpy() for outputs in seen.loss_fn_outputs if "logprobs" in outputs]
    if len(found) != len(data):
        raise ServerError(f"the forward pass gave logprobs for {len(found)} of {len(data)} datums", code="BAD_ANSWER")
    return [_where_counted(datum, values) for datum, values in zip(data, found, strict=True)]


def _where_counted(datum: Datum, values: NDArray[Any]) -> NDArray[Any]:
    """The values of the positions that have a target, 0.0 in place of the others, as float32."""
    import numpy as np

    counted = datum.loss_fn_inputs[TARGETS].to_numpy() != IGNORED
    if values.shape != counted.shape:
        raise ServerError(f"logprobs of shape {values.shape} for targets {counted.shape}", code="BAD_ANSWER")
    return np.where(counted, values, 0.0).astype(np.float32)


def _by_torch(
    data: Sequence[Datum], loss_fn: CustomLoss, logprobs: list[NDArray[Any]]
) -> tuple[float, list[NDArray[Any]], Mapping[str, float]]:
    import torch

    leaves = [torch.from_numpy(array.copy()).requires_grad_() for array in logprobs]
    loss, metrics = _parts(loss_fn(data, leaves), 2)
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad:
        raise checks.refuse("loss_fn", "(a scalar torch tensor computed from the logprobs, metrics)", loss)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]
    return float(loss.detach()), [gradient.numpy() for gradient in gradients], metrics


def _by_numpy(
    data: Sequence[Datum], loss_fn: CustomLoss, logprobs: list[NDArray[Any]]
) -> tuple[float, list[NDArray[Any]], Mapping[str, float]]:
    import numpy as np

    loss, given, metrics = _parts(loss_fn(data, [array.copy() for array in logprobs]), 3)
    gradients = [np.asarray(gradient, dtype=np.float32) for gradient in given]
    if [gradient.shape for gradient in gradients] != [array.shape for array in logprobs]:
        raise checks.refuse("loss_fn", "one gradient for each datum, of the shape of its logprobs", given)
    return float(loss), gradients, metrics


def _parts(answer: object, count: int) -> tuple[Any, ...]:
    wanted = "(loss, metrics)" if count == 2 else "(loss, gradients, metrics)"
    if not isinstance(answer, tuple) or len(answer) != count or not isinstance(answer[-1], Mapping):
        raise checks.refuse("loss_fn", f"to return {wanted}, metrics a dict of numbers", answer)
    return answer


def _weighted(index: int, datum: Datum, gradient: NDArray[Any]) -> Datum:
    import numpy as np

    targets = datum.loss_fn_inputs[TARGETS]
    counted = targets.to_numpy() != IGNORED
    if not np.isfinite(gradient[counted]).all():
        message = f"data[{index}]: the gradient of loss_fn is not finite"
        raise InvalidRequestError(message, field=f"data[{index}]", constraint="a finite gradient of loss_fn")
    weights = TensorData.from_numpy(_where_counted(datum, -gradient))
    return Datum(datum.model_input, {TARGETS: targets, "weights": weights})
