"""From logits to tokens: pure functions over a batch in which every row has its own settings.

The order is that of transformers: repetition penalty, presence and frequency penalty, temperature, top-k, top-p, and
then one draw by inverting the cumulative distribution at one uniform number. A temperature of 0 takes the largest
penalised logit. The logprob of the token is log-softmax of the *unpenalised* logits over the temperature (over 1 where
it is 0), so that it is what a training pass computes for the same token.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Penalties", "Settings", "Truncation", "keep_top", "penalize", "pick", "sample", "score"]

_BLOCK = 128  # columns that share one entry of the coarse cumulative sum
_BELOW_ONE = 1.0 - 2.0**-32


@attrs.frozen(eq=False)
class Penalties:
    """What some rows have said already, and what saying it again costs."""

    rows: Tensor  # (P,) int64: the rows this is about
    seen: Tensor  # (P, V) bool: in prompt or output
    counts: Tensor  # (P, V) float: times in the output
    repetition: Tensor  # (P, 1)
    presence: Tensor  # (P, 1)
    frequency: Tensor  # (P, 1)


@attrs.frozen(eq=False)
class Truncation:
    """Rows that draw from the head of their distribution only."""

    rows: Tensor  # (R,) int64
    top_k: Tensor  # (R, 1) int64; at least the vocabulary means off
    top_p: Tensor  # (R, 1) float64
    candidates: int  # how many tokens of each row to look at first: no top_k in use is larger
    enough: bool  # whether no row can need more than those


@attrs.frozen(eq=False)
class Settings:
    """How each row of a batch is sampled."""

    temperature: Tensor | None  # (B, 1), 1 where greedy; None: 1 everywhere
    greedy: Tensor | None  # (G,) int64 rows; None: every row
    penalties: Penalties | None = None
    truncation: Truncation | None = None


def sample(logits: Tensor, settings: Settings, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of ``logits`` (B, V) with its number of ``uniforms`` (B,) float64.

    Gives tokens (B,) int64 and logprobs (B,) float64. The logprob is NaN where the logits of a row are not finite.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scaled = _scaled(logits, settings.temperature)  # (B, V), the largest is 0
    weights = _blocks(scaled.exp())  # (B, blocks, BLOCK)
    total = weights.sum((-1, -2))
    tokens = _tokens(logits, weights, settings, uniforms)
    logprobs = scaled.gather(1, tokens[:, None]).squeeze(1).double() - total.double().log()
    return tokens, logprobs


def score(logits: Tensor, tokens: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give each row's log-softmax at ``tokens`` (N,), and the ids and values of its ``top_k`` largest (N, top_k)."""
    logprobs = functional.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    values, ids = logprobs.topk(top_k)
    return logprobs.gather(1, tokens[:, None]).squeeze(1), ids, values


def penalize(logits: Tensor, penalties: Penalties) -> Tensor:
    """Lower the logits (P, V) of what was said: repetition as in CTRL, presence and frequency as in the OpenAI API.

    Source: Keskar et al., arXiv:1909.05858, section 4.1, in the sign-aware form of transformers.
    """
    repetition = penalties.repetition
    repeated = torch.where(logits < 0, logits * repetition, logits / repetition)
    logits = torch.where(penalties.seen, repeated, logits)
    counts = penalties.counts
    return logits - counts * penalties.frequency - (counts > 0) * penalties.presence


def keep_top(weights: Tensor, truncation: Truncation) -> Tensor:
    """Zero all but the head of each row of ``weights`` (R, V): first the top-k, then of those the nucleus.

    The nucleus is the smallest set of most probable tokens whose share is at least ``top_p`` (Holtzman et al.,
    arXiv:1904.09751, section 3.1). Tokens that tie with the last one kept are kept too.
    """
    threshold, decided = _threshold(weights, truncation, truncation.candidates)
    if not truncation.enough and not bool(decided.all()):
        threshold, _ = _threshold(weights, truncation, weights.shape[1])
    return weights.masked_fill(weights < threshold, 0.0)


def pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a column of each row of ``weights`` (B, blocks, BLOCK) >= 0 where the cumulative share passes ``uniforms``.

    Two sums, over blocks and inside one, keep all 53 bits of the uniform number at the price of one pass.
    """
    mass = weights.sum(-1).double()  # (B, blocks)
    edges = mass.cumsum(-1)
    target = (uniforms.clamp(max=_BELOW_ONE) * edges[:, -1])[:, None]
    block = (edges <= target).sum(-1, keepdim=True).clamp_(max=edges.shape[1] - 1)  # (B, 1)
    inside = target - (edges - mass).gather(1, block)
    fraction = (inside / mass.gather(1, block)).clamp_(0.0, _BELOW_ONE)
    rows = torch.arange(weights.shape[0], device=weights.device)
    inner = weights[rows, block.squeeze(1)].double().cumsum(-1)  # (B, BLOCK)
    column = (inner <= fraction * inner[:, -1:]).sum(-1)
    return block.squeeze(1) * _BLOCK + column


def _tokens(logits: Tensor, weights: Tensor, settings: Settings, uniforms: Tensor) -> Tensor:
    """Choose: ``weights`` (B, blocks, BLOCK) may be written to, ``logits`` may not."""
    penalties, truncation, greedy = settings.penalties, settings.truncation, settings.greedy
    if penalties is not None:
        logits = logits.index_copy(0, penalties.rows, penalize(logits[penalties.rows], penalties))
    if greedy is None:
        return logits.argmax(-1)
    if penalties is not None:
        temperature = None if settings.temperature is None else settings.temperature[penalties.rows]
        weights[penalties.rows] = _blocks(_scaled(logits[penalties.rows], temperature).exp())
    if truncation is not None:
        flat = weights[truncation.rows].flatten(1)  # padding is 0 and stays 0
        weights[truncation.rows] = keep_top(flat, truncation).view(-1, *weights.shape[1:])
    tokens = pick(weights, uniforms)
    return tokens.index_copy(0, greedy, logits[greedy].argmax(-1)) if len(greedy) else tokens


def _scaled(logits: Tensor, temperature: Tensor | None) -> Tensor:
    shifted = logits - logits.amax(-1, keepdim=True)  # first, so that a tiny temperature cannot overflow
    return shifted if temperature is None else shifted.div_(temperature)


def _blocks(weights: Tensor) -> Tensor:
    """View (B, V) as (B, blocks, BLOCK), with zeros where V does not divide."""
    padding = -weights.shape[1] % _BLOCK
    weights = functional.pad(weights, (0, padding)) if padding else weights
    return weights.view(weights.shape[0], -1, _BLOCK)


def _threshold(weights: Tensor, truncation: Truncation, width: int) -> tuple[Tensor, Tensor]:
    """Find the smallest weight kept in each row (R, 1), and whether ``width`` candidates were enough to say so."""
    head = weights.topk(width, sorted=True).values
    limited = torch.arange(width, device=weights.device) < truncation.top_k  # (R, width)
    mass = head.double() * limited
    bounded = truncation.top_k <= width
    total = torch.where(bounded, mass.sum(-1, keepdim=True), weights.sum(-1, keepdim=True).double())
    before = mass.cumsum(-1) - mass
    kept = limited & ((before < truncation.top_p * total) | (truncation.top_p >= 1.0))
    last = (kept.sum(-1, keepdim=True) - 1).clamp_(min=0)
    decided = bounded | ~kept[:, -1:]
    return head.gather(1, last), decided
