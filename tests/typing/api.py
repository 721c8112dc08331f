"""What both type checkers must see in the faces. Never executed: checked by ``test_typing.py``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, assert_type, final

from tg_tinker.core.call import Call, Composed, Flow, call
from tg_tinker.core.run import RunCore
from tg_tinker.errors import TGTinkerError
from tg_tinker.faces import blocking, composed, composed_twin, operation, stream, stream_twin, twin
from tg_tinker.futures import APIFuture, FutureHandle, OperationFuture
from tg_tinker.wire.route import Route


class Loss:
    """A result."""


STEP: Route[Loss] = Route("step", "POST", "/step", Loss, "submit")


@final
class Trainer:
    """One plan of each kind."""

    core: RunCore

    @operation
    def step(self, batch: list[int], scale: float = 1.0, *, note: str | None = None) -> Call[Loss]:
        """Take a step."""
        return call(STEP, {"batch": batch, "scale": scale, "note": note})

    step_async = twin(step)

    @blocking
    def evaluate(self, batch: list[int]) -> Call[float]:
        """Evaluate."""
        return call(STEP, batch, decode=float)

    evaluate_async = twin(evaluate)

    @blocking
    def close(self) -> Flow[None]:
        """Close."""
        return Flow(operation="close", steps=self.core.aclose)

    aclose = twin(close, name="aclose")

    @stream
    def tokens(self, prompt: str) -> Call[str]:
        """Stream."""
        return call(STEP, prompt, decode=str)

    tokens_async = stream_twin(tokens)

    @composed
    def publish(self, name: str) -> Composed[int]:
        """Publish."""

        async def then(_: object) -> int:
            return 1

        return Composed(first=call(STEP, name), then=then, operation="publish")

    publish_async = composed_twin(publish)


async def faces(trainer: Trainer) -> None:
    """Each face gives what its kind says."""
    future = trainer.step([1], 2.0, note="x")
    assert_type(future, OperationFuture[Loss])
    submitting = trainer.step_async([1], note=None)
    typed = assert_type(submitting, Coroutine[Any, Any, OperationFuture[Loss]])
    assert_type(await typed, OperationFuture[Loss])
    assert_type(await (await trainer.step_async([1])), Loss)
    assert_type(await trainer.step([1]), Loss)

    assert_type(trainer.evaluate([1]), float)
    assert_type(await trainer.evaluate_async([1]), float)
    assert_type(trainer.tokens("x"), Iterator[str])
    assert_type(trainer.tokens_async("x"), AsyncIterator[str])
    async for piece in trainer.tokens_async("x"):
        assert_type(piece, str)
    assert_type(trainer.publish("x"), OperationFuture[int])
    assert_type(trainer.publish("x").result(), int)
    assert_type(await trainer.publish_async("x"), int)
    await trainer.aclose()
    trainer.close()


async def futures(future: OperationFuture[Loss]) -> None:
    """A future is generic in its result, under all its names."""
    assert_type(future.result(), Loss)
    assert_type(future.result(timeout=1.5), Loss)
    assert_type(await future, Loss)
    assert_type(await future.result_async(timeout=2), Loss)
    assert_type(future.wait(1), bool)
    assert_type(future.done(), bool)
    assert_type(future.is_done(), bool)
    assert_type(future.status, str)
    assert_type(future.id, str)
    assert_type(future.cancel(), bool)
    assert_type(await future.cancel_async(), bool)
    assert_type(future.exception(), BaseException | None)
    assert_type(future.as_concurrent().result(), Loss)
    future.add_done_callback(lambda done: assert_type(done.result(), Loss))
    handle: FutureHandle[Loss] = future
    api: APIFuture[Loss] = handle
    assert_type(api.result(), Loss)


def caught(error: TGTinkerError) -> None:
    """Errors have typed fields."""
    assert_type(error.code, str)
    assert_type(error.request_id, str | None)
