"""Per-example clipping of LoRA gradients: from each layer's factors to clipped sums, jointly over all layers.

The gradients of single examples are formed directly: with rank r they are small (Σ r(in + out) values per example). The
plain functions come first; ``ExampleClipper`` plugs them into a backward pass. Nothing here knows the privacy budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs
import torch
from torch import Tensor

from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

Pair = tuple[Tensor, Tensor]


class Factors(Protocol):
    """What a layer's LoRA gradients are made of; every tensor is (examples, tokens, features)."""

    @property
    def inputs(self) -> Tensor:
        """What A saw, dropout applied."""
        ...

    @property
    def hidden(self) -> Tensor:
        """A x."""
        ...

    @property
    def hidden_grad(self) -> Tensor:
        """Gradient of the loss in A x."""
        ...

    @property
    def output_grad(self) -> Tensor:
        """Gradient of the loss in the layer's output."""
        ...

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        ...


@attrs.frozen(eq=False)
class Clipped:
    """Sums over examples, clipped. ``norms`` are the examples' norms before; an example that is not finite counts 0."""

    sums: dict[str, Pair]  # layer -> (A (rank, in), B (out, rank)), fp32 or wider
    norms: Tensor  # (examples,)
    factors: Tensor  # (examples,): what each gradient was multiplied with

    @property
    def num_clipped(self) -> int:
        """How many examples were scaled down."""
        return int((self.factors < 1.0).sum())

    @property
    def num_dropped(self) -> int:
        """How many examples had a gradient that is not finite."""
        return int((~torch.isfinite(self.norms)).sum())


def example_gradients(factors: Factors) -> Pair:
    """Form one layer's gradients per example: A (examples, rank, in), B transposed, (examples, rank, out).

    Short and wide products are several times faster than long and narrow ones.
    """
    a = torch.bmm(factors.hidden_grad.transpose(1, 2), factors.inputs)
    b = torch.bmm((factors.hidden * factors.scale).transpose(1, 2), factors.output_grad)
    return _wide(a), _wide(b)


def clip_and_sum(gradients: Mapping[str, Pair], max_grad_norm: float, weights: Tensor | None = None) -> Clipped:
    """Scale each example of ``example_gradients`` to a joint L2 norm of at most ``max_grad_norm``, and add them up.

    Abadi et al. 2016 (arXiv:1607.00133), algorithm 1. ``weights`` (examples,) multiply the gradients beforehand: they
    turn those of summed losses into those of mean losses. A gradient that is not finite contributes nothing.
    """
    tensors = [tensor for pair in gradients.values() for tensor in pair]
    norms = torch.stack([torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in tensors])
    norms = torch.linalg.vector_norm(norms, dim=0)  # (examples,)
    weights = torch.ones_like(norms) if weights is None else weights.to(norms)
    norms = norms * weights
    finite = torch.isfinite(norms)
    factors = torch.where(finite, (max_grad_norm / norms).clamp(max=1.0), torch.zeros_like(norms))
    sums = {
        layer: (_weighted_sum(a, factors * weights, finite), _weighted_sum(b, factors * weights, finite).t())
        for layer, (a, b) in gradients.items()
    }
    return Clipped(sums, norms, factors)


class ExampleClipper:
    """Collects one micro-batch's gradients while backward runs, then clips: one clipper per backward pass.

    Bind it as the recorder of the adapter, call ``backward`` on the sum of the examples' losses, then ``clip``.
    ``weights`` (examples,) multiply each example's gradient before it is clipped.
    """

    def __init__(self, examples: int, max_grad_norm: float, weights: Tensor | None = None) -> None:
        self._examples = examples
        self._max_grad_norm = max_grad_norm
        self._weights = weights
        self._gradients: dict[str, Pair] = {}

    def record(self, layer: str, factors: Factors) -> None:
        """Keep a layer's gradients; a layer used twice adds up before its norm is taken.

        Raises ``InvalidRequestError`` where the layer does not see one example per row.
        """
        if factors.inputs.ndim != 3 or factors.inputs.shape[0] != self._examples:
            message = (
                f"differential privacy needs one example per row at every layer; {layer} sees "
                f"{tuple(factors.inputs.shape)} for {self._examples} examples (experts, or an adapted output head)"
            )
            raise InvalidRequestError(message, field="dp_config")
        a, b = example_gradients(factors)
        if layer in self._gradients:
            before_a, before_b = self._gradients[layer]
            a, b = a + before_a, b + before_b
        self._gradients[layer] = (a, b)

    @torch.no_grad()
    def clip(self) -> Clipped:
        """Clip and add up what was recorded."""
        gradients, self._gradients = self._gradients, {}
        return clip_and_sum(gradients, self._max_grad_norm, self._weights)


def _wide(tensor: Tensor) -> Tensor:
    """Give at least fp32: norms are taken of the very values that are summed."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _weighted_sum(gradients: Tensor, factors: Tensor, finite: Tensor) -> Tensor:
    """Sum factor times gradient over examples: (examples, m, n) -> (m, n)."""
    flat = gradients.flatten(1)
    if not bool(finite.all()):
        flat = torch.where(finite[:, None], flat, torch.zeros_like(flat))  # 0 times infinity would be NaN
    return torch.mv(flat.t(), factors).view(gradients.shape[1:])
