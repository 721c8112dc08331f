"""One plan, every face: decorators that publish a plan as a future-returning, blocking, streaming or awaitable method.

A plan is a plain method that validates and encodes on the caller's thread and returns what is to be done. The faces
run it, so validation errors surface at the call, and hand the rest to the client's core.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, Protocol, TypeVar, cast

from tg_tinker.core.call import Call, Composed, Flow, Plan
from tg_tinker.core.compose import compose
from tg_tinker.core.run import RunCore
from tg_tinker.futures import OperationFuture
from tg_tinker.futures.backing import Home
from tg_tinker.threads.channel import Channel, drop

__all__ = [
    "AsyncChunks",
    "Chunks",
    "Client",
    "blocking",
    "composed",
    "composed_twin",
    "operation",
    "stream",
    "stream_twin",
    "twin",
]


class Client(Protocol):
    """What a class needs so that its plans can be published; ``core`` is public but not documented."""

    @property
    def core(self) -> RunCore:
        """Where its calls go."""
        ...


S = TypeVar("S", bound=Client)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_ONE_READER = "a stream cannot be copied or pickled: read it where it was opened, and pass its chunks on"
_PLAN = re.compile(r"(?:\w+\.)*(?:Call|Flow|Plan|Composed)\[(?P<result>.*)\](?:\s*\|.*)?")


# ------------------------------------------------------------------------------------------ long operations


def operation(plan: Callable[Concatenate[S, P], Call[R]]) -> Callable[Concatenate[S, P], OperationFuture[R]]:
    """Publish a plan as a method that submits and returns an ``OperationFuture``."""

    def submit(client: S, /, *args: P.args, **kwargs: P.kwargs) -> OperationFuture[R]:
        core = client.core
        waits = _may_wait(core, plan)
        future = core.start(plan(client, *args, **kwargs))
        if waits:
            core.wait_acceptance(future)
        return future

    def submit_async(client: S, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, OperationFuture[R]]:
        core = client.core
        return core.acceptance(core.start(plan(client, *args, **kwargs)))

    return _publish(submit, submit_async, plan, "OperationFuture[{}]", "Coroutine[Any, Any, OperationFuture[{}]]")


def composed(plan: Callable[Concatenate[S, P], Composed[R]]) -> Callable[Concatenate[S, P], OperationFuture[R]]:
    """Publish a plan of several steps as a method that submits the first and returns the future of the last."""

    def submit(client: S, /, *args: P.args, **kwargs: P.kwargs) -> OperationFuture[R]:
        core = client.core
        waits = _may_wait(core, plan)
        future = compose(core, plan(client, *args, **kwargs))
        if waits:
            core.wait_acceptance(future)
        return future

    def submit_async(client: S, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, OperationFuture[R]]:
        core = client.core
        return core.acceptance(compose(core, plan(client, *args, **kwargs)))

    def perform_async(client: S, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        return compose(client.core, plan(client, *args, **kwargs)).result_async()

    _dress(perform_async, plan, "Coroutine[Any, Any, {}]", "_async")
    submit._value_twin = perform_async  # type: ignore[attr-defined]
    return _publish(submit, submit_async, plan, "OperationFuture[{}]", "Coroutine[Any, Any, OperationFuture[{}]]")


# ------------------------------------------------------------------------------------------------- direct


def blocking(plan: Callable[Concatenate[S, P], Plan[R]]) -> Callable[Concatenate[S, P], R]:
    """Publish a plan as a method that blocks until it has the result."""

    def perform(client: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        client.core.home.check_blocking(f"{name}()")
        start = _begun(client.core, plan(client, *args, **kwargs))
        return client.core.home.run(start())

    def perform_async(client: S, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        return client.core.home.hop(_begun(client.core, plan(client, *args, **kwargs)))

    name = plan.__name__
    return _publish(perform, perform_async, plan, "{}", "Coroutine[Any, Any, {}]")


def _begun(core: RunCore, plan: Plan[R]) -> Callable[[], Coroutine[Any, Any, R]]:
    if isinstance(plan, Call):
        return core.begin(plan)
    if isinstance(plan, Flow):
        return plan.run
    raise TypeError(f"a plan of a direct operation returns a Call or a Flow, not {plan!r}")


# ------------------------------------------------------------------------------------------------ streams


class Chunks(Generic[T]):
    """An iterator over a stream. Leaving it early (``break``, an error, ``close()``) ends the stream at its source."""

    def __init__(self, channel: Channel[T], home: Home, name: str) -> None:
        self._channel = channel
        self._home = home
        self._name = name

    def __iter__(self) -> Iterator[T]:
        """Itself: a stream is read once."""
        return self

    def __next__(self) -> T:
        """Block for the next chunk."""
        self._home.check_blocking(f"iterating over {self._name}()")
        try:
            return self._channel.receive()
        except EOFError:
            raise StopIteration from None

    def close(self) -> None:
        """End the stream at its source; what has not been read is dropped."""
        drop(self._channel)

    def __del__(self) -> None:
        """Do not leave the server generating for nobody."""
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied: the end of the copy would be the end of the stream."""
        raise TypeError(_ONE_READER)


class AsyncChunks(Generic[T]):
    """As ``Chunks``, for ``async for``."""

    def __init__(self, channel: Channel[T]) -> None:
        self._channel = channel

    def __aiter__(self) -> AsyncIterator[T]:
        """Itself: a stream is read once."""
        return self

    async def __anext__(self) -> T:
        """Await the next chunk."""
        try:
            return await self._channel.receive_async()
        except EOFError:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """End the stream at its source; what has not been read is dropped."""
        drop(self._channel)

    def __del__(self) -> None:
        """Do not leave the server generating for nobody."""
        drop(self._channel)

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied: the end of the copy would be the end of the stream."""
        raise TypeError(_ONE_READER)


def stream(plan: Callable[Concatenate[S, P], Call[R]]) -> Callable[Concatenate[S, P], Iterator[R]]:
    """Publish a plan as a method that opens a stream and returns an iterator over its chunks."""

    def open_stream(client: S, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        core = client.core
        waits = _may_wait(core, plan)
        channel = core.stream(plan(client, *args, **kwargs))
        chunks = Chunks(channel, core.home, plan.__name__)
        if waits:
            channel.opened.wait()
            channel.raise_refusal()
        return chunks

    def open_stream_async(client: S, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[R]:
        return AsyncChunks(client.core.stream(plan(client, *args, **kwargs)))

    return _publish(open_stream, open_stream_async, plan, "Iterator[{}]", "AsyncIterator[{}]")


# -------------------------------------------------------------------------------------------------- twins


def twin(
    face: Callable[Concatenate[S, P], T], *, name: str | None = None
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """The awaitable form of a method: gives what the method returns (a future, or the result of a direct one)."""
    return cast("Callable[Concatenate[S, P], Coroutine[Any, Any, T]]", _twin(face, name))


def composed_twin(
    face: Callable[Concatenate[S, P], OperationFuture[T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """The awaitable form of a method made by ``composed``: gives the result itself."""
    return cast("Callable[Concatenate[S, P], Coroutine[Any, Any, T]]", _twin(face, None, "_value_twin"))


def stream_twin(face: Callable[Concatenate[S, P], Iterator[T]]) -> Callable[Concatenate[S, P], AsyncIterator[T]]:
    """The ``async for`` form of a method made by ``stream``."""
    return cast("Callable[Concatenate[S, P], AsyncIterator[T]]", _twin(face, None))


def _twin(face: Callable[..., Any], name: str | None, kind: str = "_twin") -> Callable[..., Any]:
    made: Callable[..., Any] | None = getattr(face, kind, None)
    if made is None:
        raise TypeError(f"{face!r} is not a face: decorate the plan first")
    if name is not None:
        made.__qualname__ = f"{made.__qualname__.removesuffix(made.__name__)}{name}"
        made.__name__ = name
    return made


# ------------------------------------------------------------------------------------------------ publish


def _publish(
    face: Callable[Concatenate[S, P], T],
    other: Callable[Concatenate[S, P], Any],
    plan: Callable[Concatenate[S, P], object],
    returns: str,
    other_returns: str,
) -> Callable[Concatenate[S, P], T]:
    """Give both faces the plan's name, signature and docstring, each with what it really returns."""
    _dress(face, plan, returns, "")
    _dress(other, plan, other_returns, "_async")
    face._twin = other  # type: ignore[attr-defined]
    return face


def _dress(face: Callable[..., Any], plan: Callable[..., Any], returns: str, suffix: str) -> None:
    functools.update_wrapper(face, plan)
    del face.__wrapped__  # type: ignore[attr-defined]
    face.__name__ = f"{plan.__name__}{suffix}"
    face.__qualname__ = f"{plan.__qualname__}{suffix}"
    signature = inspect.signature(plan)
    result = returns.format(_result(signature.return_annotation))
    face.__annotations__ = {**plan.__annotations__, "return": result}
    face.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]


def _result(annotation: object) -> str:
    """The ``R`` of an annotation such as ``Call[R]``."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    match = _PLAN.fullmatch(text)
    if match is None:
        raise TypeError(f"a plan is annotated with what it returns, such as Call[OptimStepResult], not {text}")
    return match["result"]


def _may_wait(core: RunCore, plan: Callable[..., object]) -> bool:
    """Whether this thread runs no event loop, so that waiting for the server's acceptance stalls nobody.

    Raises ``BlockingCallError`` where it would wait for a loop that nobody runs.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        core.home.check_blocking(f"{plan.__name__}()")
        return True
    return False
