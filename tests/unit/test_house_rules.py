"""The rules of the house that no linter knows; CONTRIBUTING.md says them in words."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "tg_tinker").rglob("*.py"))
EVERYTHING = sorted(
    path for part in ("tg_tinker", "tests", "examples", "benchmarks") for path in (ROOT / part).rglob("*.py")
)
UNSAFE = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def name(path: Path) -> str:
    """Name a file the way a reader would."""
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    """Parse a file once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def length(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_long() -> None:
    """No file has more than 500 lines, tests and examples included."""
    assert {name(path): length(path) for path in EVERYTHING if length(path) > 500} == {}


def test_the_median_file_is_short() -> None:
    """Half of the package's files have fewer than 200 lines."""
    assert statistics.median(map(length, PACKAGE)) < 200


def test_no_function_is_long() -> None:
    """No function of the package has more than 60 lines."""
    functions = (
        (path, node)
        for path in PACKAGE
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    long = [f"{name(path)}:{node.name}" for path, node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    assert long == []


def test_everything_that_is_installed_is_pinned() -> None:
    """Every dependency is in constraints.txt, at a version that it allows; but for wandb, which no command needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [Requirement(text) for text in chain(project["dependencies"], *project["optional-dependencies"].values())]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    loose = [one.name for one in named if one.name not in pins or pins[one.name] not in one.specifier]
    assert loose == ["wandb"]


def test_every_module_says_what_it_is_for() -> None:
    """Every module opens with a docstring of at most six lines."""
    docs = {name(path): ast.get_docstring(tree(path)) for path in PACKAGE if path.read_text(encoding="utf-8").strip()}
    drawn = {"tg_tinker/errors.py"}  # draws its whole tree
    assert [file for file, doc in docs.items() if not doc] == []
    assert [file for file, doc in docs.items() if doc and len(doc.splitlines()) > 6 and file not in drawn] == []


def test_every_test_states_its_promise() -> None:
    """Every test has a docstring."""
    silent = [
        f"{name(path)}:{node.name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def imported(path: Path) -> set[str]:
    """Name the top-level modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_nothing_is_unpickled() -> None:
    """The package imports nothing that runs code while it reads data, and never calls torch.load or torch.save."""
    assert {name(path): found for path in PACKAGE if (found := imported(path) & UNSAFE)} == {}
    calls = [
        f"{name(path)}:{node.lineno}"
        for path in PACKAGE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr in {"load", "save"}
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    assert calls == []


@cache
def comments(path: Path) -> dict[int, str]:
    """Give the comments of a file by line."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


def is_wide(handler: ast.ExceptHandler) -> bool:
    """Tell whether a handler takes whatever comes."""
    return handler.type is None or (isinstance(handler.type, ast.Name) and handler.type.id == "Exception")


def test_every_wide_except_says_why() -> None:
    """An ``except Exception`` has a comment above it, on its line, or on the line below."""
    silent = [
        f"{name(path)}:{node.lineno}"
        for path in PACKAGE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and is_wide(node)
        and not comments(path).keys() & set(range(node.lineno - 1, node.lineno + 2))
    ]
    assert silent == []


def test_comments_are_few() -> None:
    """Comments say why, so the package needs at most eight in a hundred lines."""
    said = sum(len(comments(path)) for path in PACKAGE)
    assert said <= 0.08 * sum(map(length, PACKAGE))


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "XX" + "X:"])
def test_nothing_is_left_for_later(word: str) -> None:
    """No file of the package notes work that is still to be done: that belongs in the tracker."""
    assert [name(path) for path in PACKAGE if word in path.read_text(encoding="utf-8")] == []


def test_the_examples_train_on_what_the_package_ships() -> None:
    """The lessons in examples/data are those of the demo."""
    shipped = {path.name: path.read_bytes() for path in (ROOT / "tg_tinker" / "cli" / "data").glob("*.jsonl")}
    assert shipped
    assert {path.name: path.read_bytes() for path in (ROOT / "examples" / "data").glob("*.jsonl")} == shipped
