"""Every face of a plan sends the same call, and looks like what it is."""

from __future__ import annotations

import asyncio
import inspect
import pydoc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fixtures.client import Numbered, Toy, connect, connect_here
from fixtures.server import ThreadedServer

from tg_tinker import errors
from tg_tinker.core.call import Call, Flow, Plan
from tg_tinker.faces import AsyncChunks, Chunks, blocking, operation, twin
from tg_tinker.futures import OperationFuture

Sent = tuple[str, str, Any]


@pytest.fixture
def toy(threaded: ThreadedServer) -> Iterator[Toy]:
    """A client on the bridge thread."""
    threaded.script.served_version, threaded.script.chunks = 1000, 2
    client = connect(threaded.script.url)
    yield client
    client.close()


def run(work: Any) -> Any:
    """Await something on a loop of its own."""

    async def main() -> Any:
        return await work()

    return asyncio.run(main())


async def listed(chunks: Any) -> list[Any]:
    """What an async iterator gives."""
    return [chunk async for chunk in chunks]


PLANS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "forward_backward": (([1, 2],), {"batch_hash": "sha256:00"}),
    "optim_step": ((), {"eager": False}),
    "sample": (("a prompt",), {"max_tokens": 7}),
    "health": ((), {}),
    "sample_stream": (("a prompt",), {}),
    "publish": (("a name",), {}),
}


def plain(toy: Toy, name: str) -> Any:
    """Use the plain face and take its result."""
    args, named = PLANS[name]
    made = getattr(toy, name)(*args, **named)
    if isinstance(made, OperationFuture):
        return made.result(30)
    return list(made) if isinstance(made, Chunks) else made


def awaited(toy: Toy, name: str) -> Any:
    """Use the awaitable face and take its result."""
    args, named = PLANS[name]

    async def work() -> Any:
        made = getattr(toy, f"{name}_async")(*args, **named)
        if isinstance(made, AsyncChunks):
            return await listed(made)
        result = await made
        return await result if isinstance(result, OperationFuture) else result

    return run(work)


def inside_a_loop(toy: Toy, name: str) -> Any:
    """Use the plain face of a long operation inside a loop, and await what it returns."""
    args, named = PLANS[name]

    async def work() -> Any:
        made = getattr(toy, name)(*args, **named)
        return await made if isinstance(made, OperationFuture) else None

    return run(work)


@pytest.mark.parametrize("name", PLANS)
def test_every_face_sends_the_same_call(threaded: ThreadedServer, toy: Toy, name: str) -> None:
    """One definition: method, path and body do not depend on how it is called."""
    faces: list[Callable[[Toy, str], Any]] = [plain, awaited]
    if name in {"forward_backward", "optim_step", "publish"}:
        faces.append(inside_a_loop)
    seen: list[Sent] = []
    for face in faces:
        before = len(threaded.script.requests)
        result = face(toy, name)
        assert result
        method, path = threaded.script.requests[before]
        body = threaded.script.accepted(name)[-1].body if threaded.script.accepted(name) else None
        seen.append((method, path, body))
    assert all(call == seen[0] for call in seen)


def test_the_same_faces_work_on_the_callers_loop() -> None:
    """A client of the running loop has the same methods."""

    async def main() -> None:
        from fixtures.server import ScriptedServer

        server = ScriptedServer(served_version=1000, chunks=2)
        await server.start()
        toy = connect_here(server.url)
        future = await toy.forward_backward_async([1])
        assert await future == Numbered(1)
        assert await toy.optim_step() == Numbered(2)
        assert await toy.sample_async("x") == Numbered(3)
        assert await toy.publish_async("x") == "x@4"
        assert len(await listed(toy.sample_stream_async("x"))) == 2
        assert len(await listed(AsyncChunks(toy.core.stream(_stream_plan(toy))))) == 2
        await toy.aclose()
        await server.stop()

    asyncio.run(main())


def _stream_plan(toy: Toy) -> Call[Numbered]:
    from fixtures.client import SAMPLE_STREAM

    from tg_tinker.core.call import call

    return call(SAMPLE_STREAM, {"prompt": "x"}, base=toy.base)


SIGNATURES = {
    "forward_backward": "(self, batch: 'list[int]', batch_hash: 'str | None' = None) -> 'OperationFuture[Numbered]'",
    "forward_backward_async": (
        "(self, batch: 'list[int]', batch_hash: 'str | None' = None)"
        " -> 'Coroutine[Any, Any, OperationFuture[Numbered]]'"
    ),
    "sample": "(self, prompt: 'str', *, max_tokens: 'int' = 128) -> 'Numbered'",
    "sample_async": "(self, prompt: 'str', *, max_tokens: 'int' = 128) -> 'Coroutine[Any, Any, Numbered]'",
    "health": "(self) -> 'dict[str, Any]'",
    "sample_stream": "(self, prompt: 'str') -> 'Iterator[Numbered]'",
    "sample_stream_async": "(self, prompt: 'str') -> 'AsyncIterator[Numbered]'",
    "publish": "(self, name: 'str', ceiling: 'float' = 30.0) -> 'OperationFuture[str]'",
    "publish_async": "(self, name: 'str', ceiling: 'float' = 30.0) -> 'Coroutine[Any, Any, str]'",
    "close": "(self) -> 'None'",
    "aclose": "(self) -> 'Coroutine[Any, Any, None]'",
}


def unspaced(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_name_and_docstring_are_true(name: str) -> None:
    """``inspect.signature``, ``help()`` and annotations tell what the face takes and gives."""
    face = getattr(Toy, name)
    assert str(inspect.signature(face)) == SIGNATURES[name]
    assert face.__name__ == name
    assert face.__qualname__ == f"Toy.{name}"
    assert face.__module__ == Toy.__module__
    assert face.__annotations__["return"] == SIGNATURES[name].rpartition(" -> '")[2][:-1]
    text = pydoc.plain(pydoc.render_doc(face))
    assert unspaced(f"{name}{SIGNATURES[name]}") in unspaced(text)  # newer Pythons put a long one on several lines
    assert inspect.getdoc(face) is not None
    assert str(inspect.getdoc(face)) in text


def test_bound_methods_drop_self() -> None:
    """On an instance the signature starts with the first argument."""
    assert str(inspect.signature(Toy.sample.__get__(object()))).startswith("(prompt: 'str'")


def test_a_call_with_wrong_arguments_is_a_type_error_at_the_call(toy: Toy) -> None:
    """Names and counts are checked by the plan's own signature."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'bach_hash'"):
        toy.forward_backward([1], bach_hash="x")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        toy.forward_backward_async([1], bach_hash="x")  # type: ignore[call-arg]


def test_validation_raises_on_the_callers_thread(threaded: ThreadedServer, toy: Toy) -> None:
    """A plan that refuses its arguments sends nothing."""
    with pytest.raises(errors.InvalidRequestError):
        toy.forward_backward([])
    assert threaded.script.requests == []


def test_a_twin_needs_a_face() -> None:
    """``twin`` of a plain function says what is missing."""
    with pytest.raises(TypeError, match="is not a face"):
        twin(lambda _: None)


def test_a_plan_needs_its_annotation() -> None:
    """Without a return annotation no true signature can be made."""

    def plan(client: Toy) -> int:
        raise NotImplementedError

    with pytest.raises(TypeError, match=r"such as Call\[OptimStepResult\]"):
        operation(plan)  # type: ignore[arg-type]


def test_annotations_that_are_not_strings_work() -> None:
    """A module without postponed annotations may have plans too."""

    def plan(client: Toy) -> Any:
        raise NotImplementedError

    plan.__annotations__["return"] = Flow[int]
    face = blocking(plan)
    assert str(inspect.signature(face)) == "(client: 'Toy') -> 'int'"


def test_a_blocking_plan_returns_a_call_or_a_flow(toy: Toy) -> None:
    """Anything else is a mistake in the facade, named."""

    def plan(client: Toy) -> Plan[int]:
        return Plan()

    with pytest.raises(TypeError, match="returns a Call or a Flow"):
        blocking(plan)(toy)
