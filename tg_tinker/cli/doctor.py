"""``tg-tinker doctor``: what is here, what is missing, and what to do about each lack."""

from __future__ import annotations

import sys

import attrs
import click
from rich.table import Table
from rich.text import Text

from tg_tinker.cli import checkup
from tg_tinker.cli import output as out

__all__ = ["command"]

_STYLES = {"ok": "green", "note": "yellow", "missing": "bold red"}


@click.command("doctor")
@out.format_option
def command(output: str) -> None:
    """Say what is installed here, what is missing, and what to do about it.

    Exits with 1 where something is missing that `tg-tinker demo` needs.
    """
    found = list(checkup.findings())
    if output == out.JSON:
        out.show_rows([attrs.asdict(one) for one in found], {}, output)
    else:
        _show(found)
    sys.exit(1 if any(one.state == "missing" for one in found) else 0)


def _show(found: list[checkup.Finding]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("what", "state", "detail"):
        table.add_column(column, overflow="fold")
    for one in found:
        detail = Text(one.detail)
        if one.advice:
            detail.append(f"\n-> {one.advice}", "bold")
        table.add_row(Text(one.what), Text(one.state, _STYLES[one.state]), detail)
    out.show(table)
