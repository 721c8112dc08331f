"""``tg-tinker futures``: the operations that a server accepted, and what became of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tg_tinker.cli import output as out
from tg_tinker.cli.connection import connected, server_options
from tg_tinker.errors import ResourceNotFoundError

if TYPE_CHECKING:
    from tg_tinker import FutureInfo, ServiceClient

__all__ = ["command"]

_COLUMNS = {
    "future_id": "Future",
    "operation": "Operation",
    "status": "Status",
    "training_client_id": "Run",
    "created": "Accepted",
    "took": "Took",
}
_STATUSES = ["pending", "running", "completed", "failed", "cancelled"]


@click.group("futures")
def command() -> None:
    """List, look at and cancel operations. Results are kept for an hour."""


@command.command("ls")
@click.option("--run", metavar="RUN", help="Only operations of this run.")
@click.option("--status", type=click.Choice(_STATUSES), help="Only operations that are so.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@server_options
@out.format_option
@out.advice_for_people
def list_futures(
    run: str | None, status: str | None, limit: int, base_url: str | None, api_key: str | None, output: str
) -> None:
    """List the operations, newest first, those of earlier programs too."""
    with connected(base_url, api_key) as service:
        futures = service.list_futures(run, status, limit)
    out.show_rows([one.to_dict() if output == out.JSON else _row(one) for one in futures], _COLUMNS, output)


@command.command("show")
@click.argument("future")
@server_options
@out.format_option
@out.advice_for_people
def show_future(future: str, base_url: str | None, api_key: str | None, output: str) -> None:
    """Show FUTURE: how far it is, and its result or its error."""
    with connected(base_url, api_key) as service:
        info = service.get_future_info(future)
        outcome = _outcome(service, info)
    out.show_one({**info.to_dict(), **outcome}, output)


@command.command("cancel")
@click.argument("future")
@server_options
@out.format_option
@out.advice_for_people
def cancel_future(future: str, base_url: str | None, api_key: str | None, output: str) -> None:
    """Keep FUTURE from taking effect; exits with 1 where it is too late for that."""
    with connected(base_url, api_key) as service:
        cancelled = service.get_future(future).cancel()
        status = "cancelled" if cancelled else service.get_future_info(future).status
    line = "{future_id} is cancelled" if cancelled else "{future_id} cannot be cancelled any more: it is {status}"
    out.say(line, {"future_id": future, "cancelled": cancelled, "status": status}, output)
    sys.exit(0 if cancelled else 1)


def _outcome(service: ServiceClient, info: FutureInfo) -> dict[str, Any]:
    if info.completed_at is None:
        return {}
    try:
        future = service.get_future(info.future_id)
    except ResourceNotFoundError:
        return {}  # a stream: what it gave was never kept
    error = future.exception()
    if error is not None:
        return {"error": str(error), "code": getattr(error, "code", None)}
    result = future.result()
    return {"result": result.to_dict() if hasattr(result, "to_dict") else result}


def _row(future: FutureInfo) -> dict[str, Any]:
    ended, begun = future.completed_at, future.started_at
    took = None if ended is None or begun is None else f"{(ended - begun).total_seconds():.2f} s"
    return {**future.to_dict(), "created": out.when(future.created_at), "took": took}
