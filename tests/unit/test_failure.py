"""Failures as values: each look makes a fresh exception that says the same."""

from __future__ import annotations

import pytest

from tg_tinker.failure import Failure


class RewardError(Exception):
    """As users write them: the constructor takes other arguments than it hands on."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step = step


def test_an_exception_of_the_users_own_comes_out_as_it_went_in() -> None:
    """Class, message, attributes and notes survive, though the constructor cannot be called with ``args``."""
    error = RewardError(3, "no reward")
    error.add_note("first")
    again = Failure.of(error).with_note("second").error()
    assert isinstance(again, RewardError)
    assert again is not error
    assert (str(again), again.step, again.__notes__) == ("step 3: no reward", 3, ["first", "second"])
    assert Failure.of(error).error().__notes__ == ["first"]


class LogError(OSError):
    """A builtin with more to it, and a constructor of its own."""

    def __init__(self, path: str) -> None:
        super().__init__(28, "no space left", path)
        self.tried = 3


def test_what_builtins_keep_beside_their_args_survives() -> None:
    """File names of an OSError, the module of an ImportError, the place of a UnicodeDecodeError are there again."""
    moved = Failure.of(OSError(18, "cross-device link", "a.txt", None, "b.txt")).error()
    assert isinstance(moved, OSError)
    assert (moved.errno, moved.filename, moved.filename2) == (18, "a.txt", "b.txt")
    missing = Failure.of(ImportError("no module", name="peft", path="/x")).error()
    assert isinstance(missing, ImportError)
    assert (missing.name, missing.path, str(missing)) == ("peft", "/x", "no module")
    undecoded = Failure.of(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")).error()
    assert isinstance(undecoded, UnicodeDecodeError)
    assert (undecoded.start, undecoded.object) == (0, b"\xff")
    full = Failure.of(LogError("log.txt")).error()
    assert isinstance(full, LogError)
    assert (full.errno, full.filename, full.tried) == (28, "log.txt", 3)
    assert str(full) == str(LogError("log.txt"))


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no such file"), KeyError("x"), SystemExit(3)], ids=repr)
def test_a_builtin_exception_is_made_by_its_own_constructor(error: BaseException) -> None:
    """What the constructors of builtins set beside ``args`` is set again."""
    again = Failure.of(error).error()
    assert repr(again) == repr(error)
    assert getattr(again, "errno", None) == getattr(error, "errno", None)
    assert getattr(again, "code", None) == getattr(error, "code", None)
