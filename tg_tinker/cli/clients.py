"""``tg-tinker clients``: the runs of the TG surface that a server holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tg_tinker.cli import output as out
from tg_tinker.cli.connection import connected, server_options

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
}


@click.group("clients")
def command() -> None:
    """List, look at and delete training runs.

    A run lives in the server that holds it. Without a server elsewhere one is run here, which holds none yet: what
    earlier programs saved is found by `tg-tinker artifacts ls`.
    """


@command.command("ls")
@click.option("--status", type=click.Choice(["active", "completed", "failed"]), help="Only runs that are so.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@server_options
@out.format_option
@out.advice_for_people
def list_clients(status: str | None, limit: int, base_url: str | None, api_key: str | None, output: str) -> None:
    """List the runs, newest first."""
    with connected(base_url, api_key) as service:
        runs = service.list_training_clients(status, limit)
    out.show_rows([run.to_dict() if output == out.JSON else _row(run) for run in runs], _COLUMNS, output)
    if not runs and service.config.base_url is None:
        out.talk().print("a run lives in its server, and the one of this command is new; --base-url names another")


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
@out.advice_for_people
def remove_clients(runs: tuple[str, ...], base_url: str | None, api_key: str | None, *, yes: bool) -> None:
    """Delete each RUN with all that was not saved; its artifacts stay."""
    if not yes:
        click.confirm(f"Delete {', '.join(runs)}? What was not saved is lost", abort=True, err=True)
    with connected(base_url, api_key) as service:
        for run in runs:
            service.delete_training_client(run)
            click.echo(f"{run} is deleted")


def _row(run: TrainingClientInfo) -> dict[str, Any]:
    spent = run.dp_metrics or {}
    epsilon = spent.get("total_epsilon")
    shown = None if run.dp_metrics is None else "infinite" if spent.get("epsilon_is_infinite") else f"{epsilon:.3g}"
    return {**run.to_dict(), "epsilon": shown, "created": out.when(run.created_at)}
