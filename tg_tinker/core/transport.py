"""HTTP on the home loop: one aiohttp session, authentication, retries with idempotency keys, status to error.

It knows requests and replies; what an operation is, and in which order operations go, is decided above.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from io import BytesIO
from secrets import SystemRandom
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.bridge import Home
from tg_tinker.core.endpoint import Endpoint
from tg_tinker.core.gate import Gate
from tg_tinker.core.reply import Reply
from tg_tinker.errors import ClientClosedError, ServerUnreachableError, TGTinkerError
from tg_tinker.wire import codec
from tg_tinker.wire import headers as names

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Connection", "Request", "RetryPolicy"]

_TRANSIENT = frozenset({408, 429, 502, 503, 504})
_CONNECT_TIMEOUT = 10.0  # seconds
_MOST_CONNECTIONS = 4096
_LARGE = 512 * 1024  # bytes
_random = SystemRandom()


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often a request is tried again: ``count`` times at most, ``patience`` seconds after the first try at most."""

    count: int = 5
    patience: float = 60.0
    first_delay: float = 0.2
    longest_delay: float = 8.0

    def delay(self, attempt: int, asked: float | None) -> float:
        """Seconds before try number ``attempt`` (from 1): what the server asked for, else exponential with jitter."""
        if asked is not None:
            return asked
        ceiling = min(self.longest_delay, self.first_delay * 2.0 ** (attempt - 1))
        return _random.uniform(ceiling / 2, ceiling)


@attrs.frozen(kw_only=True)
class Request:
    """One HTTP request; ``path`` is relative to the server, or a whole URL; ``good`` are the statuses wanted."""

    method: str
    path: str
    body: bytes | None = attrs.field(default=None, repr=False)
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    key: str | None = None
    timeout: float = 60.0
    good: frozenset[int] = frozenset(range(200, 300))
    keyless: bool = False  # for a signed URL, which may be somebody else's


class _Tries:
    """The tries of one request: counts them, and knows when to give up."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._made = 0
        self._deadline = asyncio.get_running_loop().time() + policy.patience

    async def after(self, failure: TGTinkerError, reply: Reply | None = None) -> None:
        """Wait for the next try, or raise ``failure`` where there is to be none."""
        if reply is not None and reply.status not in _TRANSIENT:
            raise failure
        if isinstance(failure, ServerUnreachableError) and failure.url is None:
            raise failure  # no server could be started here: the network is not to blame
        if isinstance(failure.__cause__, ValueError):
            raise failure  # a certificate that is not trusted, or a URL that is none, is the same at the next try
        self._made += 1
        delay = self._policy.delay(self._made, None if reply is None else reply.retry_after())
        late = asyncio.get_running_loop().time() + delay > self._deadline
        if self._made > self._policy.count or late:
            raise failure
        await asyncio.sleep(delay)


def _nothing(_: Mapping[str, str]) -> None:
    """Nobody wants to hear of headers."""


class Connection:
    """The one session that all clients of a service share; every method runs on the home loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        home: Home,
        *,
        policy: RetryPolicy | None = None,
        headers: Mapping[str, str] | None = None,
        verify_ssl: bool = True,
        timeout: float = 60.0,
        hear: Callable[[Mapping[str, str]], object] = _nothing,
    ) -> None:
        self.endpoint = endpoint
        self.home = home
        given = policy or RetryPolicy()
        self.policy = attrs.evolve(given, patience=min(given.patience, timeout))  # who wants no long wait gets none
        self.timeout = timeout  # seconds without a byte, where a call says nothing of its own
        self._headers = dict(headers or {})
        self._verify_ssl = verify_ssl
        self._hear = hear  # told the headers of every answer
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = asyncio.Lock()
        self._gate = Gate()
        self.polls = asyncio.Semaphore()
        self.closed = False
        self._parents: list[aiohttp.BaseConnector | None] = []

    # ------------------------------------------------------------------------------------------ requests

    async def send(self, request: Request) -> Reply:
        """Send until there is an answer, and raise the typed error of one that is not in ``request.good``."""
        tries = _Tries(self.policy)
        while True:
            try:
                async with self.exchange(request) as response:
                    reply = Reply(response.status, response.headers, await response.read())
            except ServerUnreachableError as error:
                await tries.after(error)
                continue
            if reply.status in request.good:
                return reply
            await tries.after(reply.error(), reply)

    async def stream(self, request: Request, opened: Callable[[], None]) -> AsyncGenerator[bytes, None]:
        """The pieces of a response as they arrive; calls ``opened`` once its headers say that it is a good one."""
        tries = _Tries(self.policy)
        while True:
            async with AsyncExitStack() as stack:
                try:
                    response = await stack.enter_async_context(self.exchange(request))
                except ServerUnreachableError as error:
                    await tries.after(error)
                    continue
                if response.status in request.good:
                    opened()
                    async for piece in response.content.iter_any():
                        yield piece
                    return
                reply = Reply(response.status, response.headers, await response.read())
            await tries.after(reply.error(), reply)

    @asynccontextmanager
    async def exchange(self, request: Request) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        """One request and its response. Raises ``ServerUnreachableError``, or what the endpoint knows of the matter."""
        await self._open()
        base, key = await self._resolve()
        import aiohttp  # only now: opening the session has loaded it, off this loop

        url = request.path if request.path.startswith(("http://", "https://")) else base + request.path
        options: dict[str, Any] = {
            "data": _payload(request.body),
            "headers": self._all_headers(request, key),
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=request.timeout),
            "allow_redirects": False,
        }
        try:
            async with self._gate.slot():
                session = await self._open()  # once more: it may have been closed during the waits
                async with session.request(request.method, url, **options) as response:
                    self._hear(response.headers)
                    yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise await self._explained(error, url) from error

    async def _resolve(self) -> tuple[str, str | None]:
        try:
            return await self.endpoint.resolve()
        except ServerUnreachableError as error:
            if self.closed:
                raise ClientClosedError("the client was closed while it waited for the server") from error
            raise

    async def _explained(self, error: Exception, url: str) -> TGTinkerError:
        if self.closed:
            return ClientClosedError("the client was closed while it waited for the server")
        known = await self.endpoint.explain(error)
        return known or ServerUnreachableError(f"no answer from {url}: {str(error) or type(error).__name__}", url=url)

    def _all_headers(self, request: Request, key: str | None) -> dict[str, str]:
        sent = {**self._headers, **request.headers}
        if key and not request.keyless:
            sent["Authorization"] = f"Bearer {key}"
        if request.key:
            sent[names.IDEMPOTENCY_KEY] = request.key
        if request.body is not None:
            sent.setdefault("Content-Type", "application/json")
        return sent

    # ------------------------------------------------------------------------------------------- session

    def is_open(self) -> bool:
        """Whether there is a session to be closed."""
        return self._session is not None

    async def _open(self) -> aiohttp.ClientSession:
        running = asyncio.get_running_loop()
        if self.closed:
            raise ClientClosedError("this client is closed; make a new one")
        if self._loop is not None and self._loop is not running and not self._loop.is_closed():
            message = f"this connection lives on {self._loop!r} and was used from {running!r}"
            raise TGTinkerError(message, code="WRONG_LOOP")
        if self._session is None or self._loop is not running:
            return await self._open_session(running)
        return self._session

    async def _open_session(self, running: asyncio.AbstractEventLoop) -> aiohttp.ClientSession:
        if self._loop is not running:
            limit = _connection_limit()
            self._loop, self._session = running, None
            self._opening, self._gate, self.polls = asyncio.Lock(), Gate(), asyncio.Semaphore(limit - limit // 8)
        async with self._opening:
            if self._session is None:
                session = await _new_session(verify_ssl=self._verify_ssl)
                if self.closed:
                    await session.close()
                    raise ClientClosedError("the client was closed while it waited for the server")
                self._session = session
                self.home.host(self)
            return self._session

    async def disconnect(self) -> None:
        """Close the session and its connections; the next request opens others."""
        session, self._session = self._session, None
        self.home.unhost(self)
        if session is not None:
            await session.close()

    async def aclose(self) -> None:
        """Close for good; a second call does nothing."""
        self.closed = True
        await self.disconnect()

    def abandon(self) -> None:
        """Forget the session without closing it: this is a forked child, and the parent goes on using it."""
        if self._session is not None:
            self._parents.append(self._session.connector)  # were it collected here, it would close the parent's sockets
            self._session.detach()
        self._session = self._loop = None


def _payload(body: bytes | None) -> bytes | BytesIO | None:
    """A large body is written piece by piece, so that the loop does not stall."""
    return BytesIO(body) if body is not None and len(body) > _LARGE else body


def _load() -> None:
    """Load what the first request needs: it takes a quarter of a second, which no loop should stall for."""
    importlib.import_module("aiohttp")
    codec.decode(dict, codec.loads(codec.dumps({})))


async def _new_session(*, verify_ssl: bool) -> aiohttp.ClientSession:
    await asyncio.to_thread(_load)
    import aiohttp

    connector = aiohttp.TCPConnector(limit=_connection_limit(), ttl_dns_cache=300, ssl=verify_ssl)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


def _connection_limit() -> int:
    """Half of the files this process may open, 4096 at most: long polls hold one connection each."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return _MOST_CONNECTIONS
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(64, min(_MOST_CONNECTIONS, soft // 2))
