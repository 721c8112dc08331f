"""The shared server and its clients."""

from __future__ import annotations

from fixtures.embedded import home, service, tc, trainer

__all__ = ["home", "service", "tc", "trainer"]
