from __future__ import annotations

from types import SimpleNamespace

import pytest

from tg_tinker.server import cpu_threads


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [({1: 1.0, 2: 0.5, 4: 0.6}, 2), ({1: 1.0, 2: 0.9, 4: 0.8}, 4), ({1: 1.0, 2: 3.0, 4: 0.1}, 1)],
)
def test_the_thread_count_is_measured(monkeypatch, seconds, chosen):
    """More threads are taken only where they are clearly faster, and none are tried once they are slower."""
    used = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.set_num_threads", used.append)
    monkeypatch.setattr(cpu_threads, "_candidates", lambda: sorted(seconds))
    monkeypatch.setattr(cpu_threads, "_seconds", lambda _: seconds[used[-1]])
    model = SimpleNamespace(num_parameters=lambda: 10**9)
    base = SimpleNamespace(name="m", model=model, device=SimpleNamespace(type="cpu"))
    measured = cpu_threads.CpuThreads(None)
    measured.fit(base)
    assert used[-1] == chosen
    count = len(used)
    measured.fit(base)
    cpu_threads.CpuThreads(3).fit(base)
    assert len(used) == count


def test_a_small_model_gets_one_thread_unmeasured(monkeypatch):
    """A small model computes on the one thread that ``prepare`` set, however quiet the machine is at the moment."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.set_num_threads", lambda count: pytest.fail(f"set to {count}"))
    model = SimpleNamespace(num_parameters=lambda: 7_000_000)
    cpu_threads.CpuThreads(None).fit(SimpleNamespace(name="m", model=model, device=SimpleNamespace(type="cpu")))
