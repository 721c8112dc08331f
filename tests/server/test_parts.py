from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures.fake_engine import MODEL, FakeEngine
from fixtures.server_client import BATCH

from tg_tinker.errors import InvalidRequestError, QueueFullError, RateLimitedError
from tg_tinker.server import threads
from tg_tinker.server.limits import Admission, RateLimit
from tg_tinker.server.middleware import ROOMS
from tg_tinker.server.ownership import Ownership
from tg_tinker.server.serving.versions import LEASES, Version, Versions
from tg_tinker.server.settings import Settings
from tg_tinker.server.training.checkpoint_uri import CheckpointUri


def version(number: int) -> Version:
    """A published version without weights."""
    return Version(number, f"v{number}", None)


async def test_versions_in_use_outlive_newer_ones():
    """The newest few stay, and of the others those that were used lately; the count is bounded whatever is used."""
    versions = Versions(kept=3, most_aside=0)
    for number in range(1, 11):
        versions.add(version(number))
        versions.get(1)
    assert versions.newest == 10
    assert [number for number in range(11) if versions.get(number) is not None] == [1, 8, 9, 10]
    for number in range(11, 500):
        versions.add(version(number))
        versions.get(number)
    assert len(versions) <= 3 + LEASES


async def test_waiting_for_a_version_is_an_event():
    """Whoever waits is woken by the publish that is enough, not by one before it, and by the end of the server."""
    versions = Versions(kept=2, most_aside=0)
    waiting = asyncio.create_task(versions.reached(2, 20))
    versions.add(version(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    versions.add(version(2))
    assert await waiting
    assert not await versions.reached(3, 0.01)
    endless = asyncio.create_task(versions.reached(3, 20))
    await asyncio.sleep(0)
    versions.close()
    assert not await endless


def test_a_uri_is_parsed_whole_and_printed_back():
    """A URI survives the round trip; whatever surrounds or abbreviates it does not parse."""
    text = "bt://loops:run-1/sampler_weights/step.1_a"
    assert str(CheckpointUri.parse(text)) == text
    for bad in (f"{text}\n", f" {text}", text.replace("sampler_weights", "other"), text.replace("run-1", "..")):
        with pytest.raises(InvalidRequestError):
            CheckpointUri.parse(bad)


def test_a_server_for_others_loads_folders_only_where_it_may(tmp_path: Path):
    """On loopback any folder loads; elsewhere hub ids do, and folders below those that the operator named."""
    (tmp_path / "models").mkdir()
    inside, outside = str(tmp_path / "models" / "m"), str(tmp_path / "secret")
    own = Settings(home=tmp_path)
    assert own.may_load(outside)
    public = Settings(home=tmp_path, host="0.0.0.0", model_folders=(tmp_path / "models",))
    allowed = [public.may_load(ref) for ref in ("org/model", inside, outside, f"{inside}/../../secret", "~/x", "./x")]
    assert allowed == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_what_counts_as_this_machine(host, loopback):
    """Loopback addresses and localhost; any other name could be reached from elsewhere."""
    settings = Settings(host=host)
    assert settings.loopback is loopback
    settings.check_address(has_keys=True)
    if not loopback:
        with pytest.raises(InvalidRequestError, match="keys create"):
            settings.check_address(has_keys=False)


def test_limits_are_per_tenant():
    """One tenant's requests and samples leave another's alone."""
    rate, samples = RateLimit(2), Admission(1)
    rate.take("a")
    rate.take("a")
    with pytest.raises(RateLimitedError):
        rate.take("a")
    rate.take("b")
    with samples.one("a"):
        with pytest.raises(QueueFullError), samples.one("a"):
            pass
        with samples.one("b"):
            pass
    with samples.one("a"):
        pass


def test_a_name_is_free_when_its_process_is_gone(tmp_path: Path):
    """A live owner is not dead, a released one is, and so is any name that was never one of ours."""
    mine, other = Ownership(tmp_path), Ownership(tmp_path)
    assert not mine.is_dead(mine.name)
    assert not mine.is_dead(other.name)
    other.release()
    assert mine.is_dead(other.name)
    assert mine.is_dead("../../etc/passwd")
    mine.release()


def test_what_killed_servers_left_is_cleared_away(tmp_path: Path):
    """The lock of a process that died is removed, and its name stays dead; those of live ones stay locked."""
    code = (
        "import os, sys; from pathlib import Path; from tg_tinker.server.ownership import Ownership;"
        "print(Ownership(Path(sys.argv[1])).name, flush=True); os._exit(9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=50)
    killed = done.stdout.strip()
    mine, other = Ownership(tmp_path), Ownership(tmp_path)
    assert (tmp_path / "servers" / f"{killed}.lock").exists()
    mine.forget_dead()
    assert {path.stem for path in (tmp_path / "servers").iterdir()} == {mine.name, other.name}
    assert [mine.is_dead(name) for name in (killed, other.name, mine.name)] == [True, False, False]
    other.release()
    mine.release()


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [({1: 1.0, 2: 0.5, 4: 0.6}, 2), ({1: 1.0, 2: 0.9, 4: 0.8}, 4), ({1: 1.0, 2: 3.0, 4: 0.1}, 1)],
)
def test_the_thread_count_is_measured(monkeypatch, seconds, chosen):
    """More threads are taken only where they are clearly faster, and none are tried once they are slower."""
    used = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.set_num_threads", used.append)
    monkeypatch.setattr(threads, "_candidates", lambda: sorted(seconds))
    monkeypatch.setattr(threads, "_seconds", lambda _: seconds[used[-1]])
    model = SimpleNamespace(num_parameters=lambda: 10**9)
    base = SimpleNamespace(name="m", model=model, device=SimpleNamespace(type="cpu"))
    measured = threads.Threads(None)
    measured.fit(base)
    assert used[-1] == chosen
    count = len(used)
    measured.fit(base)
    threads.Threads(3).fit(base)
    assert len(used) == count


def test_a_small_model_gets_one_thread_unmeasured(monkeypatch):
    """A small model computes on the one thread that ``prepare`` set, however quiet the machine is at the moment."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.set_num_threads", lambda count: pytest.fail(f"set to {count}"))
    model = SimpleNamespace(num_parameters=lambda: 7_000_000)
    threads.Threads(None).fit(SimpleNamespace(name="m", model=model, device=SimpleNamespace(type="cpu")))


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


async def test_readiness_and_metrics(client):
    """Ready once the engine is imported; metrics count operations by status, for whoever has a key."""
    run = await client.create(MODEL)
    await client.run(f"{run}/forward_backward", {"batch": BATCH})
    assert (await client.get("/readyz")).status == 200
    assert (await client.get("/metrics")).body.decode().splitlines() == [
        'tg_tinker_operations{status="completed"} 1', "tg_tinker_runs 1", "tg_tinker_models 1",
    ]  # fmt: skip
