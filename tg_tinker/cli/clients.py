"""``tg-tinker clients``: the runs of the TG surface that a server holds, and those that a home remembers."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from tg_tinker import home
from tg_tinker.cli import output as out
from tg_tinker.cli.connection import connected, server_options
from tg_tinker.cli.past_runs import ELSEWHERE, ENDED, past_runs

if TYPE_CHECKING:
    from tg_tinker import TrainingClientInfo

__all__ = ["command"]

_COLUMNS = {
    "training_client_id": "Run",
    "status": "Status",
    "step": "Step",
    "epsilon": "ε",
    "model_ref": "Model",
    "created": "Created",
    "artifact_id": "Saved as",
}
_MOST = 1000  # runs that a server lists
_LIVE = ("active", "completed", "failed")


@click.group("clients")
def command() -> None:
    """List, look at and delete training runs.

    A run lives in the server that holds it, and ends with it. Without a server elsewhere one is run here, over the
    home; it holds none yet, and `ls` lists the runs that the home remembers.
    """


@command.command("ls")
@click.option("--status", type=click.Choice([*_LIVE, ENDED, ELSEWHERE]), help="Only runs that are so.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@server_options
@out.format_option
@out.advice_for_people
def list_clients(status: str | None, limit: int, base_url: str | None, api_key: str | None, output: str) -> None:
    """List the runs, newest first.

    Of this machine's home also those that "ended" with their server, and those "elsewhere", in another server over it;
    their step is that of the newest state that was saved.
    """
    with connected(base_url, api_key) as service:
        asked = service.config.base_url
        runs = [_fields(run) for run in service.list_training_clients(limit=_MOST)]
    if asked is None:
        runs += past_runs(home.folder(), {run["training_client_id"] for run in runs})
    chosen = [run for run in runs if status in {None, run["status"]}][:limit]
    out.show_rows(chosen if output == out.JSON else [_row(run) for run in chosen], _COLUMNS, output)
    if output != out.JSON:
        _explain(chosen, asked)


@command.command("show")
@click.argument("run")
@server_options
@out.format_option
@out.advice_for_people
def show_client(run: str, base_url: str | None, api_key: str | None, output: str) -> None:
    """Show RUN: its configuration, its step, and what it has spent of its privacy."""
    with connected(base_url, api_key) as service:
        client = service.get_training_client(run)
        info, privacy = client.refresh(), client.get_privacy_report()
    spent = privacy.to_dict() if privacy.enabled else None
    out.show_one({**info.to_dict(), "privacy": spent}, output)


@command.command("rm")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@server_options
@out.format_option
@out.advice_for_people
def remove_clients(runs: tuple[str, ...], base_url: str | None, api_key: str | None, output: str, *, yes: bool) -> None:
    """Delete each RUN with all that was not saved; its artifacts stay."""
    if not yes:
        click.confirm(f"Delete {', '.join(runs)}? What was not saved is lost", abort=True, err=True)
    gone: list[dict[str, Any]] = []
    with connected(base_url, api_key) as service:
        try:
            for run in runs:
                service.delete_training_client(run)
                gone.append({"training_client_id": run, "deleted": True})
        finally:
            out.say("{training_client_id} is deleted", gone, output)


def _fields(run: TrainingClientInfo) -> dict[str, Any]:
    return {**run.to_dict(), "artifact_id": None}


def _row(run: dict[str, Any]) -> dict[str, Any]:
    spent = run["dp_metrics"] or {}
    epsilon = spent.get("total_epsilon")
    shown = None if not spent else "infinite" if spent.get("epsilon_is_infinite") else f"{epsilon:.3g}"
    return {**run, "epsilon": shown, "created": out.when(datetime.fromisoformat(run["created_at"]))}


def _explain(runs: list[dict[str, Any]], asked: str | None) -> None:
    """Say what was looked at, where that is not plain, and how a run that has ended goes on."""
    if not runs:
        where = f"the home {home.folder()} remembers none" if asked is None else f"{asked} holds none"
        out.hint(f"{where}; --base-url names another server")
    elif any(run["status"] == ENDED and run["artifact_id"] for run in runs):
        out.hint("an ended run goes on as a new one: create_training_client(config, checkpoint_id=ITS_ARTIFACT)")
