from __future__ import annotations

import pytest

from tg_tinker.errors import QueueFullError, RateLimitedError
from tg_tinker.server import limits
from tg_tinker.server.limits import Admission, RateLimit


def test_limits_are_per_tenant(monkeypatch):
    """One tenant's requests and samples leave another's alone."""
    monkeypatch.setattr(limits, "monotonic", lambda: 100.0)
    rate, samples = RateLimit(2), Admission(1)
    rate.take("a")
    rate.take("a")
    with pytest.raises(RateLimitedError):
        rate.take("a")
    rate.take("b")
    with samples.one("a"):
        with pytest.raises(QueueFullError), samples.one("a"):
            pass
        with samples.one("b"):
            pass
    with samples.one("a"):
        pass
