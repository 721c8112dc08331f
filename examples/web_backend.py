"""A web service that trains a model and streams its completions at the same time, on a single event loop.

    python examples/web_backend.py --port 8080     # then: curl -N 'http://127.0.0.1:8080/complete?prompt=Once'
    python examples/web_backend.py                 # without a port it tests itself: some requests while it trains

The client lives as long as the application, on the application's own loop. The training runs in a background task. A
completion takes its place in the order of the run's operations, so it comes from the weights of that moment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import web

from tg_tinker import BatchData, LoRAConfig, OptimizerConfig, ServiceClient, TrainingClient, TrainingConfig

TEXTS = ("The lighthouse keeper counts the ships.", "Every evening the lamp is lit.", "At dawn the lamp goes out.")
TRAINING = web.AppKey("training", TrainingClient)
LOSSES = web.AppKey("losses", list[float])


def make_app(model: str) -> web.Application:
    """The whole application."""
    app = web.Application()
    app[LOSSES] = []
    app.cleanup_ctx.append(lambda application: lifespan(application, model))
    app.router.add_get("/complete", complete)
    app.router.add_get("/status", status)
    return app


async def lifespan(app: web.Application, model: str) -> AsyncIterator[None]:
    """Own the client, the run and the background task for as long as the application lives."""
    config = TrainingConfig(
        model_ref=model, lora_config=LoRAConfig(rank=8), optimizer=OptimizerConfig(learning_rate=1e-3)
    )
    async with ServiceClient() as service:
        app[TRAINING] = await service.create_training_client_async(config)
        task = asyncio.create_task(train(app), name="training")
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def train(app: web.Application) -> None:
    """Train until the application shuts down."""
    training = app[TRAINING]
    batch = BatchData.from_texts(await training.get_tokenizer_async(), TEXTS)
    while True:
        passed = await training.forward_backward_async(batch)
        stepped = await training.optim_step_async()
        app[LOSSES].append((await passed).loss)
        await stepped


async def complete(request: web.Request) -> web.StreamResponse:
    """Stream a completion as plain text; a reader who goes away stops the generation."""
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    await response.prepare(request)
    async for chunk in request.app[TRAINING].sample_stream_async(request.query.get("prompt", "The"), max_tokens=64):
        await response.write(chunk.text.encode())
    await response.write_eof()
    return response


async def status(request: web.Request) -> web.Response:
    """Say how far the training has come."""
    training, losses = request.app[TRAINING], request.app[LOSSES]
    return web.json_response({"step": training.step, "status": training.status, "loss": losses[-1] if losses else None})


async def test_itself(model: str) -> None:
    """Serve on a free port, read completions while the training goes on, and say what happened."""
    runner = web.AppRunner(make_app(model))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        async with asyncio.timeout(120), aiohttp.ClientSession(f"http://{host}:{port}") as session:
            await visit(session)
    finally:
        await runner.cleanup()


async def visit(session: aiohttp.ClientSession) -> None:
    """Act as a reader: once the training is under way, read some completions piece by piece."""
    before = await look(session)
    while not before["step"]:
        await asyncio.sleep(0.05)
        before = await look(session)
    for text in TEXTS:
        async with session.get("/complete", params={"prompt": text[:8]}) as answer:
            pieces = [piece async for piece in answer.content.iter_any()]
        print(f"read {len(pieces)} pieces: {b''.join(pieces).decode()!r}")
    after = await look(session)
    print(f"meanwhile the training went from step {before['step']} to step {after['step']}, loss {after['loss']:.3f}")


async def look(session: aiohttp.ClientSession) -> dict[str, Any]:
    """Ask how far the training has come."""
    async with session.get("/status") as answer:
        found: dict[str, Any] = await answer.json()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tg-tinker/tiny")
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    if given.port is None:
        asyncio.run(test_itself(given.model))
    else:
        web.run_app(make_app(given.model), host="127.0.0.1", port=given.port)
