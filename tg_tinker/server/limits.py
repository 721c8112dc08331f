"""What a tenant may ask for at a time: so many requests a minute, so many samples at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from time import monotonic

from tg_tinker.errors import QueueFullError, RateLimitedError


class RateLimit:
    """One bucket per tenant, which fills steadily and holds a minute's worth; None does not limit."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant -> (requests left, at what time)

    def take(self, tenant: str) -> None:
        """Let one request pass; raises ``RateLimitedError`` with the seconds until the next one may."""
        if self._per_minute is None:
            return
        now, rate = monotonic(), self._per_minute / 60.0
        left, since = self._buckets.get(tenant, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * rate)
        if left < 1.0:
            self._buckets[tenant] = left, now
            message = f"more than {self._per_minute} requests a minute; try again later"
            raise RateLimitedError(message, retry_after=(1.0 - left) / rate)
        self._buckets[tenant] = left - 1.0, now


class Admission:
    """Counts what each tenant has under way outside any run's queue."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside: Counter[str] = Counter()

    @contextmanager
    def one(self, tenant: str) -> Generator[None]:
        """Let one more in while the block runs; raises ``QueueFullError`` where there are too many."""
        if self._inside[tenant] >= self._limit:
            raise QueueFullError(f"{self._limit} samples are under way; try again later", retry_after=1.0)
        self._inside[tenant] += 1
        try:
            yield
        finally:
            self._inside[tenant] -= 1
