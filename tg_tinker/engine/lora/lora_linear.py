"""A linear layer that many LoRA adapters can share, one at a time.

The base weight stays frozen. While an adapter is bound, the layer adds ``scale * B A x`` in one fused step forward and
one backward. Which adapter is bound, and for how long, is decided in ``adapters``; nothing here knows a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Binding", "GradientFactors", "GradientRecorder", "LoRALinear", "RowSeeds", "install", "layers_of", "mix"]

_MASK_64 = (1 << 64) - 1
_LAYERS: WeakKeyDictionary[nn.Module, Mapping[str, LoRALinear]] = WeakKeyDictionary()


class GradientRecorder(Protocol):
    """Takes each layer's factors of the LoRA gradient instead of letting them be summed over the batch."""

    def record(self, layer: str, factors: GradientFactors) -> None:
        """Keep the factors of ``layer``; called once per layer and backward pass, checkpointing included."""


@attrs.frozen(eq=False)
class GradientFactors:
    """What the gradients of one layer are made of, for example ``i`` of the micro-batch.

    The gradient of A is ``hidden_grad[i].T @ inputs[i]``, that of B is ``scale * output_grad[i].T @ hidden[i]``.
    """

    inputs: Tensor  # (batch, tokens, in): what A saw, dropout applied
    hidden: Tensor  # (batch, tokens, rank): A x
    hidden_grad: Tensor  # (batch, tokens, rank): gradient of the loss in A x
    output_grad: Tensor  # (batch, tokens, out): gradient of the loss in the layer's output
    scale: float


@attrs.frozen
class RowSeeds:
    """A dropout seed for each row of a micro-batch: what a row drops then does not depend on the rows beside it."""

    seeds: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens: padding draws nothing


@attrs.frozen(eq=False)
class Binding:
    """One adapter's tensors at one layer, for as long as it is active."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float
    dropout: float = 0.0
    dropout_seed: int | RowSeeds | None = None  # None: no dropout
    recorder: GradientRecorder | None = None


class LoRALinear(nn.Linear):
    """A frozen ``nn.Linear`` with room for one bound adapter."""

    layer_name: str
    layer_index: int
    binding: Binding | None

    @property
    def matrix(self) -> Tensor:
        """The weight, (out, in)."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Linear gives it
        """Apply the base layer and, where one is bound, the adapter: (..., in) -> (..., out)."""
        binding = self.binding
        if binding is None:
            return F.linear(input, self.matrix, self.bias)
        # Shaped out here: a view made in there could not be written to, and some models add to what they are given.
        return _apply_lora(input, binding.a, binding.b, self).view(*input.shape[:-1], self.out_features)

    def draw_mask(self, x: Tensor) -> Tensor | None:
        """Draw the dropout mask from (seed, layer) alone, so that a recomputed forward draws the same one.

        Raises ``InvalidRequestError`` where rows have seeds of their own and the layer does not see them as such.
        """
        binding = self.binding
        if binding is None or binding.dropout_seed is None or binding.dropout == 0.0:
            return None
        keep, seed = 1.0 - binding.dropout, binding.dropout_seed
        if isinstance(seed, int):
            return _draw(x.shape, mix(seed, self.layer_index), keep, x.device)
        if x.ndim != 3 or len(x) != len(seed.seeds):
            seen = f"{tuple(x.shape)} for {len(seed.seeds)} rows"
            message = f"{self.layer_name} sees {seen}: what an example drops out cannot be told from the others"
            raise InvalidRequestError(message, field="target_modules", constraint="layers that see one example per row")
        mask = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        for row, own, length in zip(mask, seed.seeds, seed.lengths, strict=True):
            row[:length] = _draw(row[:length].shape, mix(own, self.layer_index), keep, x.device)
        return mask


class LoRAConv1D(LoRALinear):
    """The same for what GPT-2 has in place of ``nn.Linear``: its weight is stored as (in, out)."""

    @property
    def matrix(self) -> Tensor:
        """The weight, (out, in): a view."""
        return self.weight.t()


class _LoRAFunction(torch.autograd.Function):
    """``y = W x + bias + scale * B A (mask * x)``, (..., in) -> (N, out), with gradients for x, A and B: W is frozen.

    The rank-sized matrices are kept transposed, (rank, N): matrix products with so thin a factor run several times
    faster that way on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: LoRALinear) -> Tensor:
        binding = cast("Binding", layer.binding)
        mask = layer.draw_mask(x)
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        dropped = flat if mask is None else flat * mask.reshape(flat.shape)
        scale = binding.scale if mask is None else binding.scale / (1.0 - binding.dropout)
        hidden = torch.mm(a.to(x.dtype), dropped.t())  # (rank, N)
        output = F.linear(flat, layer.matrix, layer.bias).addmm_(hidden.t(), b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, a, b, mask, hidden)
        ctx.layer, ctx.scale, ctx.recorder = layer, scale, binding.recorder
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mask, hidden = ctx.saved_tensors
        weight = ctx.layer.matrix
        grad = grad_outputs[0].reshape(-1, weight.shape[0])  # (N, out)
        hidden_grad = torch.mm(b.to(grad.dtype).t(), grad.t()).mul_(ctx.scale)  # (rank, N)
        x_grad = _input_grad(grad, hidden_grad, weight, a, mask).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return x_grad, None, None, None
        dropped = x if mask is None else x * mask
        if ctx.recorder is not None:
            lead = x.shape[:-1]
            parts = (hidden.t().reshape(*lead, -1), hidden_grad.t().reshape(*lead, -1), grad.reshape(*lead, -1))
            ctx.recorder.record(ctx.layer.layer_name, GradientFactors(dropped, *parts, ctx.scale))
            return x_grad, None, None, None
        a_grad = torch.mm(hidden_grad, dropped.reshape(-1, x.shape[-1])).to(a.dtype)
        b_grad = torch.mm(hidden, grad).mul_(ctx.scale).t().to(b.dtype, memory_format=torch.contiguous_format)
        return x_grad, a_grad, b_grad, None


_apply_lora = cast("Callable[[Tensor, Tensor, Tensor, LoRALinear], Tensor]", _LoRAFunction.apply)


def _draw(shape: torch.Size, seed: int, keep: float, device: torch.device) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(keep, generator=generator)


def _input_grad(grad: Tensor, hidden_grad: Tensor, weight: Tensor, a: Tensor, mask: Tensor | None) -> Tensor:
    x_grad = torch.mm(grad, weight)  # (N, in)
    if mask is None:
        return x_grad.addmm_(hidden_grad.t(), a.to(grad.dtype))
    return x_grad.add_(torch.mm(hidden_grad.t(), a.to(grad.dtype)).mul_(mask.reshape(x_grad.shape)))


_ABLE: dict[type[nn.Module], type[LoRALinear]] = {nn.Linear: LoRALinear, Conv1D: LoRAConv1D}


def install(model: nn.Module) -> None:
    """Make every linear layer of ``model`` able to carry an adapter; doing it twice changes nothing."""
    if model not in _LAYERS:
        _LAYERS[model] = _replace_linears(model)


def layers_of(model: nn.Module) -> Mapping[str, LoRALinear]:
    """Give the layers that :func:`install` made, by name."""
    return _LAYERS[model]


def _replace_linears(model: nn.Module) -> Mapping[str, LoRALinear]:
    """Turn every linear layer of ``model`` into a :class:`LoRALinear`, in place.

    Changing the class keeps identity, tied weights and hooks; the parameters are the very same objects.
    """
    modules = list(cast("Iterable[tuple[str, nn.Module]]", model.named_modules()))
    for name, module in modules:
        # Exactly these: a subclass (a quantised layer, say) has a forward of its own that must not be lost.
        able = _ABLE.get(type(module))
        if able is not None:
            module.__class__ = able
            layer = cast("LoRALinear", module)
            layer.layer_name, layer.binding = name, None
            layer.out_features, layer.in_features = layer.matrix.shape
    layers = {name: module for name, module in modules if isinstance(module, LoRALinear)}
    for index, name in enumerate(sorted(layers)):
        layers[name].layer_index = index
    return layers


def mix(seed: int, index: int) -> int:
    """Spread (seed, index) over 63 bits (the splitmix64 finaliser of Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return (z ^ (z >> 31)) >> 1
