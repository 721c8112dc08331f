"""Prompts on their way into the model: whose they are, how much of each is read next, and what they score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tg_tinker.engine.sampling import logits as logits_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.sampling.decoder import Prompt
    from tg_tinker.engine.sampling.generation import GenerationRequest, TopLogprobs
    from tg_tinker.engine.sampling.stream import Stream

__all__ = ["PrefillJob", "pace", "share_out", "tokens_a_tick"]

_SCORED_AT_ONCE = 128  # tokens a tick whose logits are all wanted: it bounds the memory for them
_OLDEST_SHARE = 4  # one part in so many is for the oldest prompt
_CPU_TICK = (2 * 10**10, 256)  # floating-point operations, a quarter of a second of one core; most tokens
_GPU_TICK = (10**13, 2048)
_LEAST_PACE = 32  # tokens; fewer waste the matrices that are read for them
_MOST_PACES = 4


class PrefillJob:
    """One prompt that is read once for every stream that has it."""

    def __init__(self, prompt: Prompt, first: Stream) -> None:
        self.prompt = prompt
        self.streams = [first]
        self.scored = first.request.scores_prompt
        self._top_k = first.request.topk_prompt_logprobs
        self._logprobs: list[float] = []
        self._tops: list[TopLogprobs] = []

    @property
    def complete(self) -> bool:
        """Whether the prompt is read and somebody still wants it."""
        return bool(self.streams) and not self.prompt.remaining

    def takes(self, request: GenerationRequest) -> bool:
        """Say whether another request can share this job as it stands."""
        own = self.streams[0].request
        if request.adapter is not own.adapter or request.cache_key != own.cache_key or request.prompt != own.prompt:
            return False
        return not request.scores_prompt or (self.scored and request.topk_prompt_logprobs <= self._top_k)

    def score(self, rows: Tensor, done: int) -> bool:
        """Take the logits (T, V) of tokens from ``done`` on; False when they are not finite."""
        targets = self.prompt.tokens[done + 1 : done + 1 + len(rows)]
        ids = torch.tensor(targets, dtype=torch.int64, device=rows.device)
        chosen, top_ids, top_values = logits_of.score(rows[: len(targets)], ids, self._top_k)
        self._logprobs += chosen.tolist()
        pairs = zip(top_ids.tolist(), top_values.tolist(), strict=True)
        self._tops += [tuple(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]
        return not bool(chosen.isnan().any())

    def hand_out(self) -> None:
        """Give every stream what it asked about its prompt."""
        for stream in self.streams:
            request = stream.request
            if request.prompt_logprobs:
                stream.prompt_logprobs = (None, *self._logprobs)
            if (top_k := request.topk_prompt_logprobs) > 0:
                stream.topk_prompt_logprobs = (None, *(top[:top_k] for top in self._tops))


def pace(parameters: int, device: torch.device) -> int:
    """Give how many prompt tokens a tick may read beside running streams without stalling them for long."""
    work, most = _CPU_TICK if device.type == "cpu" else _GPU_TICK
    return max(_LEAST_PACE, min(most, work // (2 * parameters)))


def tokens_a_tick(pace: int, *, reading: int, running: int) -> int:
    """Give the budget of a tick: more where more prompts wait for each stream that is running."""
    return pace * min(_MOST_PACES, max(1, reading // running if running else _MOST_PACES))


def share_out(jobs: Sequence[PrefillJob], budget: int, *, whole: bool) -> list[tuple[PrefillJob, int]]:
    """Choose how many tokens of each job (oldest first) are read next, about ``budget`` in all.

    Short rests go first, so that a short prompt does not wait for a long one; the oldest job always gets a part, so
    that it ends. With ``whole`` a job gets everything or nothing, and at least one gets it.
    """
    by_rest = sorted(jobs, key=lambda job: job.prompt.remaining)
    if whole:
        chosen = [by_rest[0]]
        for job in by_rest[1:]:
            if sum(other.prompt.remaining for other in chosen) + job.prompt.remaining <= budget:
                chosen.append(job)
        return [(job, job.prompt.remaining) for job in chosen]
    counts: dict[PrefillJob, int] = {}
    left = {False: budget, True: min(budget, _SCORED_AT_ONCE)}  # by whether the prompt is scored
    for job, most in [(jobs[0], max(1, budget // _OLDEST_SHARE)), *((job, budget) for job in by_rest)]:
        more = min(most, left[False], left[job.scored], job.prompt.remaining - counts.get(job, 0))
        if more > 0:
            counts[job] = counts.get(job, 0) + more
            left[False] -= more
            left[True] -= more if job.scored else 0
    return list(counts.items())
