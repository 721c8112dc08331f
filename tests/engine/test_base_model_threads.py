"""How many threads the engine computes with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fixtures.training import tiny

from tg_tinker.engine import threads
from tg_tinker.errors import InvalidRequestError


@pytest.fixture(autouse=True)
def thread_count() -> Iterator[None]:
    """Put torch's thread count back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_small_model_gets_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model computes on one thread, whatever torch would have taken."""
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    torch.set_num_threads(2)
    assert threads.tune_threads(tiny()) == torch.get_num_threads() == 1


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """TG_TINKER_THREADS wins over any measurement."""
    monkeypatch.setenv(threads.VARIABLE, "2")
    assert threads.tune_threads(tiny()) == torch.get_num_threads() == 2


@pytest.mark.parametrize("value", ["0", "two", "-1", ""])
def test_a_variable_that_is_no_count_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A thread count must be a positive integer."""
    monkeypatch.setenv(threads.VARIABLE, value)
    with pytest.raises(InvalidRequestError):
        threads.tune_threads(tiny())


@pytest.mark.parametrize(("seconds", "expected"), [({1: 1.0, 2: 0.9, 4: 0.1}, 1), ({1: 1.0, 2: 0.5, 4: 0.45}, 2)])
def test_more_threads_are_taken_only_where_they_pay(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], expected: int
) -> None:
    """A larger model is measured, and threads are doubled only while that makes it clearly faster."""
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    monkeypatch.setattr(threads, "_SMALL", 0)
    monkeypatch.setattr(threads, "_seconds", lambda _base, count, _hopeless: seconds[count])
    torch.set_num_threads(4)
    assert threads.tune_threads(tiny()) == expected


def test_measuring_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a variable the model itself is timed, and never on more threads than torch was given."""
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    monkeypatch.setattr(threads, "_SMALL", 0)
    torch.set_num_threads(1)
    assert threads.tune_threads(tiny()) == 1
