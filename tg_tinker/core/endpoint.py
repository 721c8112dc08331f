"""Where the server is, and what has become of it when it does not answer."""

from __future__ import annotations

from typing import Protocol

import attrs

from tg_tinker.errors import TGTinkerError

__all__ = ["Endpoint", "FixedEndpoint"]


class Endpoint(Protocol):
    """Finds the server before each request, and explains a connection that broke."""

    async def resolve(self) -> tuple[str, str | None]:
        """The base URL, without a trailing slash, and the API key; starts the server where that is our doing."""
        ...

    async def explain(self, error: BaseException) -> TGTinkerError | None:
        """The reason of a failed connection, where it is known and trying again is no use; else None."""
        ...


def _without_slash(url: str) -> str:
    return url.rstrip("/")


@attrs.frozen
class FixedEndpoint:
    """A server at a known address, started by somebody else."""

    base_url: str = attrs.field(converter=_without_slash)
    api_key: str | None = attrs.field(default=None, repr=False)

    async def resolve(self) -> tuple[str, str | None]:
        """The address as it was given."""
        return self.base_url, self.api_key

    async def explain(self, error: BaseException) -> TGTinkerError | None:  # noqa: ARG002 - see Endpoint
        """Nothing is known about somebody else's server."""
        return None
