"""How long a client of the Loops surface waits for what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import attrs

from tg_tinker.errors import FutureTimeoutError
from tg_tinker.settings import Settings
from tg_tinker.types import arguments

__all__ = ["Waits"]


@attrs.frozen
class Waits:
    """In seconds: the trainer's silence on one request, a creation as a whole, the sampler's silence on one request."""

    trainer: float
    ready: float
    sampler: float

    @classmethod
    def given(
        cls,
        settings: Settings,
        *,
        timeout: float | None = None,
        ready_timeout: float | None = None,
        sampler_timeout: float | None = None,
    ) -> Waits:
        """Arguments of the published names; None leaves it to the service. Raises ``InvalidRequestError`` by name."""
        return cls(
            settings.timeout if timeout is None else arguments.seconds("timeout", timeout),
            settings.ready_timeout if ready_timeout is None else arguments.seconds("ready_timeout", ready_timeout),
            settings.timeout if sampler_timeout is None else arguments.seconds("sampler_timeout", sampler_timeout),
        )

    @asynccontextmanager
    async def creating(self, what: str) -> AsyncGenerator[None, None]:
        """A block that creates something. Raises ``FutureTimeoutError`` where that takes too long."""
        limit = asyncio.timeout(self.ready)
        try:
            async with limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            message = f"{what} was not there after {self.ready:g} s (ready_timeout)"
            raise FutureTimeoutError(message, timeout=self.ready) from error
