"""From tokens to target logprobs and back: one micro-batch through the model, with or without gradients.

The output head runs only where there is a target, and in chunks, so the logits of a large vocabulary never exceed a
fixed size. What the loss is, and when an optimizer steps, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tg_tinker.engine.lora.adapters import active
from tg_tinker.engine.training.losses import evaluate, rl_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.training.collation import MicroBatch
    from tg_tinker.engine.training.losses import Config, Loss

__all__ = ["Outcome", "hidden_states", "run", "target_logprobs"]

Head = Callable[[Tensor], Tensor]  # (M, hidden) -> logits (M, vocabulary)

_LOGITS_AT_ONCE = 1 << 24  # values: 64 MiB in fp32
_PLAIN_HEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@attrs.frozen(eq=False)
class Outcome:
    """What one micro-batch gave: sums, so that micro-batches simply add up."""

    loss_sum: float
    logprobs: Tensor  # (M,) or (M, K), on the CPU in fp32
    metric_sums: Mapping[str, float]


def run(
    base: BaseModel, batch: MicroBatch, loss: Loss, config: Config, *, gradients: bool, finite_only: bool = False
) -> Outcome:
    """Compute loss and target logprobs of ``batch``; with ``gradients``, add those of the summed loss to ``grad``.

    ``finite_only`` leaves losses that are not finite out of the sum that is told, not out of the gradients.
    """
    with nullcontext() if gradients else torch.no_grad():
        states, head = _labelled_states(base, batch)
        size = max(1, _LOGITS_AT_ONCE // base.vocab_size)
        chunks = [slice(start, start + size) for start in range(0, max(1, len(states)), size)]
        head_pass = _HeadPass(states, head, chunks, batch, loss, config, finite_only)
        loss_sum, logprobs = head_pass.by_chunk() if loss.rows_per_unit == 1 else head_pass.at_once()
    metrics = rl_metrics(loss, logprobs, batch.inputs, config, batch.mask) if loss.is_rl else {}
    return Outcome(loss_sum, logprobs.to("cpu", torch.float32), metrics)


def hidden_states(base: BaseModel, tokens: Tensor) -> Tensor:
    """Run the model up to its output head: (rows, width) -> (rows, width, hidden)."""
    body = cast("Callable[..., Any]", base.model.base_model)
    return cast("Tensor", body(input_ids=tokens, use_cache=False).last_hidden_state)


def target_logprobs(logits: Tensor, targets: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """Take log softmax(logits / temperature) at the targets, in fp32 or better: (M, V), (M,) -> (M,); (M, K) alike."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperatures is not None:
        logits = logits / temperatures.unsqueeze(-1)
    columns = targets.unsqueeze(-1) if targets.dim() == 1 else targets
    return _pick_logprobs(logits, columns).view(targets.shape)


def _labelled_states(base: BaseModel, batch: MicroBatch) -> tuple[Tensor, Head]:
    """The states that the head turns into logits, at the labelled positions, and that head."""
    if _has_plain_head(base):
        states = hidden_states(base, batch.tokens)
        head = cast("Head", base.model.get_output_embeddings())
    else:  # an architecture that does more to its logits (soft caps, scales): let it make them itself
        model = cast("Callable[..., Any]", base.model)
        states = cast("Tensor", model(input_ids=batch.tokens, use_cache=False).logits)
        head = _identity
    return states.flatten(0, 1).index_select(0, batch.positions), head


@attrs.frozen(eq=False)
class _HeadPass:
    """The way from the states of the labelled positions to their loss, and back."""

    states: Tensor  # (M, hidden)
    head: Head
    chunks: list[slice]  # of the M positions
    batch: MicroBatch
    loss: Loss
    config: Config
    finite_only: bool

    def by_chunk(self) -> tuple[float, Tensor]:
        """Finish each chunk, gradient included, before the next one's logits exist: for sums over positions."""
        gradients = torch.is_grad_enabled()
        losses, logprobs, state_grads = list[Tensor](), list[Tensor](), list[Tensor]()
        for chunk in self.chunks:
            leaf = self.states[chunk].detach().requires_grad_(gradients)
            inputs = {name: value[chunk] for name, value in self.batch.inputs.items() if name != "lengths"}
            values = target_logprobs(self.head(leaf), self.batch.targets[chunk], inputs.get("temperatures"))
            token_losses = evaluate(self.loss, values, inputs, self.config, self.batch.mask[chunk])
            chunk_loss = token_losses.sum()
            if gradients:
                chunk_loss.backward()
                state_grads.append(cast("Tensor", leaf.grad))
            losses.append(_finite_sum(token_losses.detach()) if self.finite_only else chunk_loss.detach())
            logprobs.append(values.detach())
        if gradients and self.states.requires_grad:
            self.states.backward(torch.cat(state_grads))
        return float(torch.stack(losses).sum(dtype=torch.float64)), torch.cat(logprobs)

    def at_once(self) -> tuple[float, Tensor]:
        """Take all logprobs together, for losses over pairs; the backward pass makes each chunk's logits again."""
        temperatures = self.batch.inputs.get("temperatures")

        def logprobs_of(chunk: slice) -> Tensor:
            scale = None if temperatures is None else temperatures[chunk]
            return target_logprobs(self.head(self.states[chunk]), self.batch.targets[chunk], scale)

        parts = [checkpoint(logprobs_of, chunk, use_reentrant=False) for chunk in self.chunks]
        values = torch.cat(cast("list[Tensor]", parts))
        total = evaluate(self.loss, values, self.batch.inputs, self.config, self.batch.mask).sum()
        if torch.is_grad_enabled():
            total.backward()
        return float(total.detach()), values.detach()


def _has_plain_head(base: BaseModel) -> bool:
    """Find out once whether logits are the output embedding of the last state and nothing else."""
    if base.model.base_model is base.model:  # its body goes by another name than the model says
        return False
    if base.model not in _PLAIN_HEAD:
        # Several tokens: the embedding of a padding token may be zero, and zero logits would tell nothing.
        tokens = torch.linspace(0, base.vocab_size - 1, 8, device=base.device).long().unsqueeze(0)
        head = cast("Head | None", base.model.get_output_embeddings())
        with torch.no_grad(), active(base, None):  # the base alone: what an adapter drops is set for other tokens
            logits = cast("Callable[..., Any]", base.model)(input_ids=tokens, use_cache=False).logits
            _PLAIN_HEAD[base.model] = head is not None and torch.equal(head(hidden_states(base, tokens)), logits)
    return _PLAIN_HEAD[base.model]


def _finite_sum(values: Tensor) -> Tensor:
    return values.where(values.isfinite(), 0.0).sum(dtype=torch.float64)


def _identity(logits: Tensor) -> Tensor:
    return logits


class _PickLogprobs(torch.autograd.Function):
    """Pick log softmax at the targets, keeping only the logits: torch's own way writes (M, V) twice more."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return logits.gather(1, targets) - logits.logsumexp(dim=1, keepdim=True)  # (M, K)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        grad = grad_outputs[0]  # (M, K)
        logits_grad = torch.softmax(logits, dim=1).mul_(-grad.sum(dim=1, keepdim=True))
        return logits_grad.scatter_add_(1, targets, grad), None


_pick_logprobs = cast("Callable[[Tensor, Tensor], Tensor]", _PickLogprobs.apply)
