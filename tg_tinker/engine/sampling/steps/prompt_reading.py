"""Reading prompts with transformers' model: several in one pass, or each for itself with a cache of its own.

Prompts that share a pass are padded behind their last token. A causal model does not look ahead, so no token sees the
padding, and nobody needs a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.cache_utils import DynamicCache

from tg_tinker.engine.sampling.steps.step_groups import StepPrompt

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.sampling.decoder import Chunk
    from tg_tinker.engine.sampling.steps.causal_pass import CausalPass
    from tg_tinker.engine.sampling.steps.padded_cache import State

__all__ = ["pack", "read_single", "read_together"]

_PADDING = 64  # tokens that a pass may waste, beside
_PADDING_SHARE = 4  # one for so many that are not
_LOGITS = 64  # rows of logits that a pass may waste: every row has them wherever one of them needs them


def pack(chunks: Iterable[Chunk]) -> list[list[Chunk]]:
    """Put chunks together that can share a pass: of one adapter, as far along, of about one length."""
    alike: dict[tuple[FrozenAdapter | None, int], list[Chunk]] = {}
    for chunk in chunks:
        alike.setdefault((chunk.prompt.adapter, chunk.prompt.done), []).append(chunk)
    passes: list[list[Chunk]] = []
    for members in alike.values():
        passes.append([])
        for chunk in sorted(members, key=lambda chunk: -chunk.count):
            if passes[-1] and _wasteful([*passes[-1], chunk]):
                passes.append([])
            passes[-1].append(chunk)
    return passes


def read_together(run: CausalPass, chunks: Sequence[Chunk]) -> list[Tensor]:
    """Read chunks of one adapter that are as far along; give the wanted logits (wanted, vocabulary) of each."""
    prompts = [cast("StepPrompt", chunk.prompt) for chunk in chunks]
    done, width = prompts[0].done, max(chunk.count for chunk in chunks)
    rows: list[tuple[int, ...]] = []
    wanted: list[range] = []
    for chunk in chunks:
        tokens = chunk.prompt.tokens[done : done + chunk.count]
        rows.append(tokens + tokens[:1] * (width - chunk.count))
        wanted.append(_wanted(chunk))
    columns = sorted(set().union(*wanted)) or [0]
    logits, cache = run(rows, prompts[0].adapter, _past(prompts), columns=columns)
    place = {column: index for index, column in enumerate(columns)}
    parts = [row[[place[column] for column in own]] for row, own in zip(logits, wanted, strict=True)]
    for row, (prompt, chunk) in enumerate(zip(prompts, chunks, strict=True)):
        prompt.state = _row(cache, row, done + chunk.count)
        prompt.done += chunk.count
    return parts


def read_single(run: CausalPass, chunk: Chunk) -> Tensor:
    """Read a whole prompt with a cache of the model's own kind; give the wanted logits (wanted, vocabulary)."""
    prompt = cast("StepPrompt", chunk.prompt)
    logits, prompt.cache = run([prompt.tokens], prompt.adapter, None)
    prompt.done = len(prompt.tokens)
    return logits[0, chunk.count - chunk.wanted :]


def _wasteful(chunks: Sequence[Chunk]) -> bool:
    """Say whether chunks, the longest first, had better not share a pass."""
    useful = sum(chunk.count for chunk in chunks)
    if len(chunks) * chunks[0].count - useful > _PADDING + useful // _PADDING_SHARE:
        return True
    columns = set().union(*map(_wanted, chunks))
    return len(chunks) * len(columns) - sum(chunk.wanted for chunk in chunks) > _LOGITS


def _wanted(chunk: Chunk) -> range:
    """Give the places in a chunk whose logits are wanted."""
    return range(chunk.count - chunk.wanted, chunk.count)


def _past(prompts: Sequence[StepPrompt]) -> DynamicCache:
    """Give a cache of full attention in every layer with what is read of the prompts, all as far along."""
    cache = DynamicCache()
    for index, layer in enumerate(zip(*(prompt.state for prompt in prompts), strict=True)):
        keys, values = (torch.stack(rows) for rows in zip(*layer, strict=True))
        cache.update(keys, values, index)
    return cache


def _row(cache: Any, row: int, length: int) -> State:
    """Take a row out of a cache: a copy, where others are in it, so that it does not keep them in memory."""
    pairs = [(layer.keys[row, :, :length], layer.values[row, :, :length]) for layer in cache.layers]
    if cache.layers[0].keys.shape[0] == 1:
        return pairs
    return [(keys.clone(), values.clone()) for keys, values in pairs]
