"""The ``ServiceClient`` of ``tg_tinker.loops``: the same, but it goes by the environment of a Loops program too."""

from __future__ import annotations

import os
from typing import ClassVar

from tg_tinker import service, settings
from tg_tinker.service.base import Progress
from tg_tinker.service.keywords import suggesting

__all__ = ["ServiceClient"]


class ServiceClient(service.ServiceClient):
    """As ``tg_tinker.ServiceClient``; ``BASETEN_API_KEY`` and ``LOOPS_BASE_URL`` go before the other variables."""

    _names: ClassVar[settings.Names] = settings.LOOPS_NAMES

    @suggesting
    def __init__(
        self,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout: float = settings.TIMEOUT,
        retry_count: int = settings.RETRY_COUNT,
        ready_timeout: float = 600.0,
        verify_ssl: bool | None = None,
        home: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            api_key,
            base_url,
            timeout=timeout,
            retry_count=retry_count,
            ready_timeout=ready_timeout,
            verify_ssl=verify_ssl,
            home=home,
            progress=progress,
        )
