"""How many requests a tenant may make: a bucket that fills steadily and holds a minute's worth."""

from __future__ import annotations

from time import monotonic

from tg_tinker.errors import RateLimitedError


class RateLimit:
    """One bucket per tenant; None does not limit."""

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
