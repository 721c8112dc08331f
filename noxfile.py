"""Everything that can be asked of this repository: ``python -m nox -s demo``, ``-s tests``, and ``-l`` for the rest.

A session fills a virtual environment of its own; under ``--no-venv`` (the CI script) it takes the one it is run in.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = (
    "virtualenv"  # with pip inside, which finds a CPU build of torch where one is offered
)
nox.options.error_on_external_run = True
nox.options.error_on_missing_interpreters = True
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "typing", "tests"]

CONSTRAINTS = ("-c", "constraints.txt")
TORCH = "torch==2.13.0"
TINY = "tg-tinker/tiny"
BARE = ("tests/bare", "tests/bridge", "tests/core", "tests/faces")  # what promises to work without the server's extra
PUBLISHED = {"0.7.1": (), "0.32.0": (TORCH,)}  # the published Loops client, and what each version needs beside itself
CHECKED = ("tg_tinker", "tests", "examples", "benchmarks", "noxfile.py")

# One thread a process: small models are fastest so, and two threads collapse when something else runs.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def install(session: nox.Session, *packages: str, torch: bool = False, pinned: bool = True) -> None:
    """Install into the session's own environment; torch first, exactly pinned, so that nothing asks for another."""
    if not session.virtualenv.is_sandboxed:
        return
    if torch:
        session.install(TORCH)
    session.install(*(CONSTRAINTS if pinned else ()), *packages)


def present(*paths: str) -> list[str]:
    """Those of the paths that exist and hold something."""
    return [path for path in paths if Path(path).is_file() or any(Path(path).glob("*"))]


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Fetch a small model, teach it something new, save it, restore it: the whole product in a few minutes."""
    install(session, "-e", ".[server]", torch=True)
    session.run("tg-tinker", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, with pytest's own arguments after ``--``."""
    install(session, "-e", ".[server,dev]", torch=True)
    session.run("pytest", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def tests_newest(session: nox.Session) -> None:
    """Run the tests with the newest releases instead of those in constraints.txt, and list what these are."""
    newest = ("--upgrade", "--upgrade-strategy", "eager", TORCH)
    install(session, *newest, "-e", ".[server,dev]", torch=True, pinned=False)
    session.run("python", "-m", "pip", "freeze", "--exclude-editable")
    session.run("pytest", *session.posargs, env=ENVIRONMENT)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, spelling and the floors that imports may not climb."""
    install(session, "codespell", "import-linter", "ruff", "-e", ".")
    paths = present(*CHECKED)
    session.run("ruff", "check", *paths)
    session.run("ruff", "format", "--check", *paths)
    session.run("codespell", *present(*CHECKED, "docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"))
    session.run("lint-imports")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the package twice, by mypy --strict and by pyright strict."""
    install(session, "-e", ".[server,dev]", torch=True)
    session.run("mypy")
    session.run("pyright", env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})


@nox.session
def tests_bare(session: nox.Session) -> None:
    """Run what must work without torch: the client, its errors and its advice on what to install."""
    tools = ("aioresponses", "blockbuster", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout")
    install(session, "-e", ".", *tools)
    session.run("pytest", *(session.posargs or BARE))


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example on the built-in tiny model, each in a home of its own."""
    install(session, "-e", ".[server,dev]", torch=True)
    for script in sorted(Path("examples").glob("*.py")):
        home = Path(session.create_tmp()) / script.stem
        session.run("python", str(script), "--model", TINY, env=ENVIRONMENT | {"TG_TINKER_HOME": str(home)})


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure, and write the figures as JSON; arguments go to the runner."""
    install(session, "-e", ".[server,dev]", torch=True)
    session.run("python", "-m", "benchmarks", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session(default=False, python="3.12")
def conformance(session: nox.Session) -> None:
    """Drive the published Loops client, each version in an environment of its own, against our server.

    Needs Python 3.12, as that client does. The server runs in the session's environment; pytest's arguments after --.
    """
    if not session.virtualenv.is_sandboxed:
        session.error("the published client and our server need environments of their own: leave --no-venv out")
    install(session, "-e", ".[server]", torch=True)
    command = shutil.which("tg-tinker", path=session.bin)
    checks = ("-c", "tests/conformance/pytest.ini", "tests/conformance")
    for version, beside in PUBLISHED.items():
        python = published_client(session, version, *beside)
        settings = ENVIRONMENT | {"TG_TINKER_COMMAND": command}
        session.run(python, "-m", "pytest", *checks, *session.posargs, env=settings, external=True)


def published_client(session: nox.Session, version: str, *beside: str) -> str:
    """Make an environment that holds the published client and nothing of ours; gives its Python."""
    folder = Path(session.virtualenv.location).resolve() / f"baseten-loops-{version}"
    if not folder.exists():
        session.run("python", "-m", "venv", str(folder))
    python = str(folder / Path(session.bin).name / "python")
    for packages in (beside, (f"baseten-loops=={version}", "pytest", "pytest-asyncio", "pytest-timeout")):
        if packages:
            session.run(python, "-m", "pip", "install", "--quiet", *packages, external=True)
    return python


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    install(session, "furo", "myst-parser", "sphinx", "-e", ".")
    session.run("sphinx-build", "-W", "--keep-going", "docs", "docs/_build/html", *session.posargs)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Run the tests under coverage and report what they leave out."""
    install(session, "-e", ".[server,dev]", torch=True)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs, env=ENVIRONMENT)
    session.run("coverage", "combine")
    session.run("coverage", "report")


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build the wheel, look inside, install it alone and ask it what it makes of the machine."""
    install(session, "build")
    folder = Path(session.create_tmp()).resolve()
    for old in folder.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "build", "--wheel", "--outdir", str(folder))
    (wheel,) = folder.glob("*.whl")
    names = session.run("python", "-m", "zipfile", "-l", str(wheel), silent=True) or ""
    assert "tg_tinker/py.typed" in names, "the wheel must tell type checkers that it has types"
    assert "tg_tinker/cli/data/marrowick_train.jsonl" in names, "the demo must run from the wheel"
    assert "tests/" not in names, "the wheel must hold the package and nothing else"
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install(*CONSTRAINTS, str(wheel))
    with session.chdir(folder):
        session.run("tg-tinker", "doctor", success_codes=[0, 1])


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "nox", "-f", __file__, *sys.argv[1:]])  # noqa: S606 - this very file
