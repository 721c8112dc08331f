"""The sampling settings of the streams that are decoded together, as tensors; rebuilt only when the streams change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tg_tinker.engine.sampling.logits import Penalties, Settings, Truncation, sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tg_tinker.engine.sampling.generation import GenerationRequest
    from tg_tinker.engine.sampling.stream import Stream

__all__ = ["SamplingBatch"]

_COLDEST = torch.finfo(torch.float32).tiny  # anything smaller is 0 in float32
_CANDIDATES = 512  # tokens that top-p looks at before it sorts a whole vocabulary


class SamplingBatch:
    """Samples the next token of the same streams again and again."""

    def __init__(self, streams: Sequence[Stream], vocab_size: int, device: torch.device) -> None:
        """Take the streams as they are now."""
        self.streams = tuple(streams)
        self._device = device
        self._settings = self._make_settings(vocab_size)

    def sample(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """Draw a token for every stream from ``logits`` (B, V); give tokens and logprobs (NaN: logits not finite)."""
        uniforms = [stream.uniform() for stream in self.streams]
        uniform = torch.tensor(uniforms, dtype=torch.float64, device=self._device)
        tokens, logprobs = sample(logits, self._settings, uniform)
        if (penalties := self._settings.penalties) is not None:
            said = tokens[penalties.rows, None]  # (P, 1)
            penalties.seen.scatter_(1, said, value=True)
            penalties.counts.scatter_add_(1, said, torch.ones_like(penalties.counts[:, :1]))
        ids, values = torch.stack((tokens.double(), logprobs)).tolist()  # the one transfer of a tick
        return [int(token) for token in ids], values

    def _make_settings(self, vocab_size: int) -> Settings:
        requests = [stream.request for stream in self.streams]
        temperatures = [max(request.temperature, _COLDEST) if request.temperature else 1.0 for request in requests]
        greedy = [row for row, request in enumerate(requests) if request.temperature == 0.0]
        all_greedy = len(greedy) == len(requests)
        return Settings(
            temperature=None if set(temperatures) == {1.0} else self._column(temperatures),
            greedy=None if all_greedy else self._rows(greedy),
            penalties=self._penalties(vocab_size),
            truncation=None if all_greedy else self._truncation(vocab_size),
        )

    def _penalties(self, vocab_size: int) -> Penalties | None:
        rows = [row for row, stream in enumerate(self.streams) if _penalized(stream.request)]
        if not rows:
            return None
        requests = [self.streams[row].request for row in rows]
        seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=self._device)
        counts = torch.zeros(len(rows), vocab_size, device=self._device)
        for place, row in enumerate(rows):
            stream = self.streams[row]
            output = self._rows(stream.tokens)
            counts[place] = torch.bincount(output, minlength=vocab_size)[:vocab_size]
            seen[place] = torch.bincount(self._rows([*stream.request.prompt, *stream.tokens]), minlength=vocab_size) > 0
        return Penalties(
            rows=self._rows(rows),
            seen=seen,
            counts=counts,
            repetition=self._column([request.repetition_penalty for request in requests]),
            presence=self._column([request.presence_penalty for request in requests]),
            frequency=self._column([request.frequency_penalty for request in requests]),
        )

    def _truncation(self, vocab_size: int) -> Truncation | None:
        limits = [min(stream.request.top_k or vocab_size, vocab_size) for stream in self.streams]
        shares = [stream.request.top_p for stream in self.streams]
        rows = [row for row, limit in enumerate(limits) if limit < vocab_size or shares[row] < 1.0]
        if not rows:
            return None
        used = [limits[row] for row in rows]
        enough = max(used) < vocab_size
        deepest = max((limit for limit in used if limit < vocab_size), default=0)
        return Truncation(
            rows=self._rows(rows),
            top_k=torch.tensor(used, device=self._device)[:, None],
            top_p=torch.tensor([shares[row] for row in rows], dtype=torch.float64, device=self._device)[:, None],
            candidates=deepest if enough else min(vocab_size, max(_CANDIDATES, deepest)),
            enough=enough,
        )

    def _rows(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]


def _penalized(request: GenerationRequest) -> bool:
    neutral = (1.0, 0.0, 0.0)
    return (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) != neutral
