"""``tg-tinker audit``: read the audit log, and check it against evidence that was kept."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from tg_tinker.cli import local_files
from tg_tinker.cli import output as out
from tg_tinker.cli.connection import connected, server_options
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tg_tinker import AuditHead, AuditLogEntry, AuditVerification, ServiceClient

__all__ = ["command"]

_COLUMNS = {
    "sequence": "#",
    "time": "Time",
    "operation": "Operation",
    "event": "Event",
    "outcome": "Outcome",
    "training_client_id": "Run",
    "error_message": "Error",
}
_PAGE = 1000
_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]


@click.group("audit")
def command() -> None:
    """Read and verify the audit log: one chain for each tenant, signed by the server."""


@command.command("ls")
@click.option("--run", metavar="RUN", help="Only entries of this run.")
@click.option("--operation", help="Only entries of this operation, such as optim_step.")
@click.option("--since", type=click.DateTime(_FORMATS), help="Only entries from this time on.")
@click.option("--until", type=click.DateTime(_FORMATS), help="Only entries up to this time.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, _PAGE), help="At most so many.")
@click.option("--offset", default=0, show_default=True, type=click.IntRange(0), help="Leave out so many at the start.")
@click.option("--all", "everything", is_flag=True, help="All there are, whatever --limit says.")
@server_options
@out.format_option
@out.advice_for_people
def list_entries(base_url: str | None, api_key: str | None, output: str, **asked: Any) -> None:
    """List entries, oldest first. The whole log as JSON is what `audit verify --log` checks."""
    with connected(base_url, api_key) as service:
        entries = _entries(service, **asked)
    out.show_rows([one.to_dict() if output == out.JSON else _row(one) for one in entries], _COLUMNS, output)


@command.command("verify")
@click.option(
    "--heads",
    "kept",
    type=click.Path(path_type=Path),
    help="A file of signed heads that you keep: the log is held against them, and its head is added.",
)
@click.option(
    "--log",
    type=click.Path(path_type=Path),
    help="Check this file, of `audit ls --all --format json`, and ask no server.",
)
@server_options
@out.format_option
@out.advice_for_people
def verify(kept: Path | None, log: Path | None, base_url: str | None, api_key: str | None, output: str) -> None:
    """Recompute the whole log and its signatures here; exits with 1 and names the first bad entry where one is bad.

    Only against a head that you kept does it show that the end was cut off, or all of it written anew.
    """
    heads = _read_heads(kept) if kept is not None and (kept.exists() or log is not None) else []
    if log is not None:
        verification = _verify_file(log, heads)
    else:
        with connected(base_url, api_key) as service:
            head = service.get_audit_head()
            verification = service.verify_audit_log([*heads, head])
        if kept is not None and verification.ok:
            _keep(kept, heads, head)
    _tell(verification, len(heads), output)
    sys.exit(0 if verification.ok else 1)


def _entries(
    service: ServiceClient, *, run: str | None, operation: str | None, since: datetime | None, until: datetime | None,
    limit: int, offset: int, everything: bool,
) -> list[AuditLogEntry]:  # fmt: skip
    entries: list[AuditLogEntry] = []
    while True:
        size = _PAGE if everything else limit
        page = service.get_audit_logs(run, operation, since, until, limit=size, offset=offset + len(entries))
        entries += page
        if not everything or len(page) < size:
            return entries


def _read_heads(path: Path) -> list[AuditHead]:
    from tg_tinker.verify import AuditHead
    from tg_tinker.wire import codec

    try:
        return [codec.decode(AuditHead, codec.loads(line)) for line in local_files.read(path).splitlines()]
    except InvalidRequestError as error:
        message = f"{path} is no file of heads, as `tg-tinker audit verify --heads` writes it: {error}"
        raise InvalidRequestError(message, field="heads") from error


def _keep(path: Path, heads: Sequence[AuditHead], head: AuditHead) -> None:
    from tg_tinker.wire import codec

    if any(one.sequence == head.sequence for one in heads):
        return
    try:
        with path.open("ab") as file:
            file.write(codec.dumps(head.to_dict()) + b"\n")
    except OSError as error:
        raise InvalidRequestError(f"the head cannot be kept in {path}: {error.strerror}", field="heads") from error


def _verify_file(log: Path, heads: Sequence[AuditHead]) -> AuditVerification:
    from tg_tinker.types import checks
    from tg_tinker.types.results import AuditLogEntry
    from tg_tinker.verify import verify_audit_log
    from tg_tinker.wire import codec

    try:
        told = codec.loads(local_files.read(log))
        entries = codec.decode(list[AuditLogEntry], told)
        for fields in told:  # no hash would cover what is added here
            checks.refuse_unknown(AuditLogEntry, fields)
    except InvalidRequestError as error:
        message = f"{log} is no log, as `tg-tinker audit ls --all --format json` gives it: {error}"
        raise InvalidRequestError(message, field="log") from error
    named = [head.tenant_id for head in heads] + [entry.tenant_id for entry in entries]
    if not named:
        raise InvalidRequestError(f"{log} is empty, and no --heads says that it should not be", field="log")
    return verify_audit_log(entries, tenant_id=named[0], heads=heads)


def _tell(verification: AuditVerification, heads: int, output: str) -> None:
    if output == out.JSON:
        out.show_one({**verification.to_dict(), "heads_kept": heads}, output)
    elif verification.ok:
        against = f"held against {heads} heads kept before" if heads else "held against no head kept before"
        click.echo(f"the log of {verification.entries} entries is whole, {against}")
    else:
        bad = f"entry {verification.first_bad} ({verification.entry_id or 'not there'}): {verification.reason}"
        out.talk().print(Text.assemble(("Error: ", "bold red"), f"the log is not whole; {bad}"), soft_wrap=True)


def _row(entry: AuditLogEntry) -> dict[str, Any]:
    outcome = None if entry.success is None else "ok" if entry.success else entry.error_code
    return {**entry.to_dict(), "time": out.when(entry.timestamp), "outcome": outcome}
