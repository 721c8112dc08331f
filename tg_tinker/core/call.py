"""One operation, validated and encoded: all that is left is to send it. Values only; nothing here does I/O."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Generic, TypedDict, TypeVar, Unpack, overload
from urllib.parse import urlencode

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.failure import Failure
from tg_tinker.threads.caller import called_at, user_site
from tg_tinker.wire import codec
from tg_tinker.wire.route import Route

__all__ = ["Call", "Composed", "Flow", "Plan", "call"]

R = TypeVar("R")
T = TypeVar("T")


class Plan(Generic[R]):
    """What a plan method returns: something that can be carried out and gives an ``R``."""

    __slots__ = ()


def _new_key() -> str:
    return uuid.uuid4().hex


@attrs.frozen(kw_only=True, eq=False)
class Call(Plan[R]):
    """One request, ready to be sent, retried and decoded.

    ``decode`` makes the result of the answer's JSON, or of the whole ``Reply`` where ``whole_reply`` is set.
    """

    route: Route[Any]
    path: str
    decode: Callable[[Any], R]
    body: bytes | None = attrs.field(default=None, repr=False)
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    whole_reply: bool = False
    sequenced: bool = False  # the body carries the operation's number on its run, as ``seq_id``
    adds_gradient: bool = False  # when this is refused, whatever was to apply the gradient must not be sent
    applies_gradient: bool = False
    eager: bool = False  # fetch the outcome at once, whether or not anybody waits
    on_result: Callable[[R], None] | None = None  # a client's bookkeeping; runs at home, before anybody sees the result
    on_failure: Callable[[Failure], None] | None = None  # likewise, where there is to be none
    timeout: float | None = None  # seconds without a byte until a request counts as lost; None: the connection's
    key: str = attrs.field(factory=_new_key)
    site: str = attrs.field(factory=user_site)

    def numbered(self, number: int) -> bytes | None:
        """The body to send, with ``seq_id`` written into it where the wire wants one."""
        if not self.sequenced or self.body is None:
            return self.body
        inside = self.body.rstrip()[:-1]
        comma = b"" if inside.endswith(b"{") else b","
        return b'%b%b"seq_id":%d}' % (inside, comma, number)


@attrs.frozen(kw_only=True, eq=False)
class Flow(Plan[R]):
    """Several requests that make one direct operation, such as creating a client; ``steps`` runs at home."""

    operation: str
    steps: Callable[[], Coroutine[Any, Any, R]]
    site: str = attrs.field(factory=user_site)

    async def run(self) -> R:
        """Take the steps."""
        with called_at(self.site):
            return await self.steps()


@attrs.frozen(kw_only=True, eq=False)
class Composed(Plan[R]):
    """A submit and what follows once it is done: ``then(result)`` starts at home whether or not anybody waits.

    Where it ``keeps_a_place``, the place behind the first's is kept in the run's order, and ``then(result, place)``
    uses it.
    """

    first: Call[Any]
    then: Callable[..., Coroutine[Any, Any, R]]
    operation: str
    keeps_a_place: bool = False


class Options(TypedDict, total=False):
    """The fields of a ``Call`` that ``call`` passes on."""

    headers: Mapping[str, str]
    whole_reply: bool
    sequenced: bool
    adds_gradient: bool
    applies_gradient: bool
    eager: bool
    on_result: Callable[[Any], None] | None
    on_failure: Callable[[Failure], None] | None
    timeout: float


@overload
def call(
    route: Route[R],
    body: object = None,
    *,
    base: str = "",
    parts: Mapping[str, str] | None = None,
    query: Mapping[str, object] | None = None,
    **options: Unpack[Options],
) -> Call[R]: ...
@overload
def call(
    route: Route[Any],
    body: object = None,
    *,
    decode: Callable[[Any], T],
    base: str = "",
    parts: Mapping[str, str] | None = None,
    query: Mapping[str, object] | None = None,
    **options: Unpack[Options],
) -> Call[T]: ...
def call(
    route: Route[Any],
    body: object = None,
    *,
    decode: Callable[[Any], Any] | None = None,
    base: str = "",
    parts: Mapping[str, str] | None = None,
    query: Mapping[str, object] | None = None,
    **options: Unpack[Options],
) -> Call[Any]:
    """The call of one row of a wire table.

    ``base`` is what its path is relative to, ``parts`` fill the path in, ``query`` leaves out what is None.
    """
    try:
        encoded = None if body is None else codec.dumps(body)
        asked = urlencode({name: value for name, value in (query or {}).items() if value is not None})
        path = route.url(**(parts or {}))
    except (TypeError, UnicodeEncodeError) as error:  # half a surrogate pair, an integer of more than 64 bits
        message = f"{route.operation}: the request cannot be written: {error}"
        raise InvalidRequestError(message, constraint="text in UTF-8, integers of 64 bits") from error
    return Call(
        route=route,
        path=f"{base}{path}{'?' if asked else ''}{asked}",
        body=encoded,
        decode=decode or partial(codec.decode, route.returns),
        **options,
    )
