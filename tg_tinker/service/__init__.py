"""``ServiceClient``: the way in. It makes clients of both surfaces over one connection."""

from __future__ import annotations

from tg_tinker.service.loops import LoopsService
from tg_tinker.service.tg import TGService

__all__ = ["ServiceClient"]


class ServiceClient(TGService, LoopsService):
    """A server, here or elsewhere, and everything that can be asked of it.

    ``ServiceClient()`` runs a server on this machine, with its state in ``home``; ``ServiceClient(base_url=...)`` (or
    an ``api_key`` that is a URL) goes to one elsewhere. Arguments go before ``TG_TINKER_*`` in the environment, these
    before ``TS_*``. ``timeout`` bounds the server's silence on one HTTP request, ``ready_timeout`` the creation of a
    client, both in seconds; ``progress(stage, text)`` is told how a creation goes.

    Used plainly it lives on a loop thread of its own and takes calls from any thread and any loop; in ``async with`` it
    lives on the caller's loop. It may be shared by threads.

    Raises ``InvalidRequestError`` naming the field; a key or tenant without a URL is one.
    """
