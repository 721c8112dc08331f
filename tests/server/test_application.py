from __future__ import annotations

import subprocess
import sys
import threading

from fixtures.fake_engine import MODEL, FakeEngine
from fixtures.server_client import BATCH

from tg_tinker.server.middleware import ROOMS


def test_the_application_starts_without_the_engine():
    """Importing the application loads neither torch nor transformers: a server listens before they are there."""
    code = "import sys, tg_tinker.server.process; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_broken_device_thread_is_told_to_everybody(serve):
    """If the device thread dies, what waits fails with a server error, and the process is told to end."""

    class Broken(FakeEngine):
        def sampler(self, base):
            sampler = super().sampler(base)
            sampler.step = lambda: 1 / 0
            return sampler

    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        client = await serve(engine=Broken())
        run = await client.create(MODEL)
        future = await client.submit(f"{run}/sample", {"prompts": "a", "max_tokens": 3})
        outcome = await client.result(future)
        assert (outcome["status"], outcome["error"]["code"]) == ("failed", "INTERNAL_ERROR")
        await client.server.app[ROOMS].crashed.wait()
        refused = await client.post(f"{run}/forward_backward", {"batch": BATCH})
        assert (refused.status, refused.error["code"]) == (500, "SHUTTING_DOWN")
    finally:
        threading.excepthook = hook


async def test_a_server_that_is_not_ready_says_so_as_an_error(serve):
    """While the engine is imported, /readyz is a 503 with an error body; /healthz answers already."""
    imported = threading.Event()

    class Slow(FakeEngine):
        def warm(self):
            assert imported.wait(20)

    client = await serve(engine=Slow())
    try:
        answer = await client.as_tenant(None).get("/readyz")
        assert (answer.status, answer.error["code"]) == (503, "STARTING")
        assert (await client.get("/healthz")).status == 200
    finally:
        imported.set()


async def test_readiness_and_metrics(client):
    """Ready once the engine is imported; metrics count operations by status, for whoever has a key."""
    run = await client.create(MODEL)
    await client.run(f"{run}/forward_backward", {"batch": BATCH})
    assert (await client.get("/readyz")).status == 200
    assert (await client.get("/metrics")).body.decode().splitlines() == [
        'tg_tinker_operations{status="completed"} 1', "tg_tinker_runs 1", "tg_tinker_models 1",
    ]  # fmt: skip
