"""The gradient that one run gathers between optimizer steps: plain sums, and how many tokens they are over.

Dividing happens once, when the step is taken, so splitting a batch over calls changes nothing. The sums live in the
``grad`` of the adapter's parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tg_tinker.engine.lora.adapters import check_tensors
from tg_tinker.errors import InvalidRequestError, OperationFailedError
from tg_tinker.wire.digest import tensor_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tg_tinker.engine.lora.adapters import Adapter
    from tg_tinker.engine.lora.lora_linear import GradientFactors

__all__ = ["ExampleGradients", "GradientSum"]


class ExampleGradients(Protocol):
    """What takes over the gradients of one micro-batch, to clip them per example, say."""

    def record(self, layer: str, factors: GradientFactors) -> None:
        """Keep the factors of one layer's gradients."""

    def finish(self, adapter: Adapter) -> None:
        """Add what became of them to the ``grad`` of the adapter's parameters."""


class GradientSum:
    """The accumulated gradient of one run."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(sorted(parameters.items()))
        self.clear()

    def __repr__(self) -> str:
        """How much has been gathered."""
        return f"<GradientSum of {self.passes} passes over {self.tokens} tokens>"

    def clear(self) -> None:
        """Drop everything gathered so far."""
        self.passes = 0
        self.tokens = 0
        self.normalised: bool | None = None  # whether the step divides by tokens; None while nothing is gathered
        for parameter in self._parameters.values():
            parameter.grad = None

    def join(self, *, normalised: bool) -> None:
        """Admit one more pass to the step.

        Raises ``InvalidRequestError`` when only one of this and what was gathered is to be divided by its tokens.
        """
        if self.normalised is not None and self.normalised != normalised:
            raise InvalidRequestError(
                "gradients with and without skip_token_normalization cannot share an optimizer step",
                field="loss_fn_config.skip_token_normalization",
                constraint="the same in every pass between two optimizer steps",
            )
        self.normalised = normalised

    def add(self, tokens: int) -> None:
        """Count a finished pass over ``tokens`` active tokens; its gradient is in ``grad`` already."""
        self.passes += 1
        self.tokens += tokens

    def reduce(self, clip_norm: float | None) -> float:
        """Divide as agreed, clip to ``clip_norm`` (None or 0: not at all), and give the norm before clipping.

        Raises ``InvalidRequestError`` when no pass was made, ``OperationFailedError`` when the gradient is not finite.
        """
        if not self.passes:
            message = "there is no gradient to step with: call forward_backward first"
            raise InvalidRequestError(message, field="optim_step", constraint="at least one forward_backward before it")
        sums = self._filled()
        if self.normalised:
            _scale(sums, 1.0 / max(1, self.tokens))
        norm = float(torch.nn.utils.get_total_norm(sums))
        if not norm < float("inf"):
            message = f"the gradient is not finite (norm {norm}): no step was taken; check learning rate and inputs"
            raise OperationFailedError(message, operation="optim_step")
        if clip_norm and norm > clip_norm:
            _scale(sums, clip_norm / norm)
        return norm

    def digest(self) -> str:
        """Hash the sums by name: equal gradients, to the bit, give equal hashes."""
        return tensor_digest({name: value.cpu().numpy() for name, value in self._sums().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The sums as ``grad.<parameter name>``, or nothing while nothing is gathered."""
        return {f"grad.{name}": value for name, value in self._sums().items()} if self.passes else {}

    def counters(self) -> dict[str, Any]:
        """What is to be kept beside the sums."""
        return {"passes": self.passes, "tokens": self.tokens, "normalised": self.normalised}

    def check(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Say whether :meth:`load` would take these; raises ``InvalidRequestError`` where they do not fit."""
        expected = {f"grad.{name}": value for name, value in self._parameters.items()} if counters["passes"] else {}
        check_tensors(tensors, expected, field="gradients", same_dtype=True)

    def load(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Continue from saved sums that passed :meth:`check`; they become this run's own."""
        self.clear()
        for name, parameter in self._parameters.items() if counters["passes"] else ():
            parameter.grad = tensors[f"grad.{name}"]
        self.passes, self.tokens, self.normalised = counters["passes"], counters["tokens"], counters["normalised"]

    def _sums(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(parameter.detach()) if parameter.grad is None else parameter.grad
            for name, parameter in self._parameters.items()
        }

    def _filled(self) -> list[Tensor]:
        """The sums, with a zero gradient where no pass touched a parameter."""
        sums = self._sums()
        for name, parameter in self._parameters.items():
            parameter.grad = sums[name]
        return list(sums.values())


def _scale(tensors: list[Tensor], factor: float) -> None:
    for tensor in tensors:
        tensor.mul_(factor)
