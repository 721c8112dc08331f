"""What every subcommand says things with: tables or JSON on standard output, everything else on standard error."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, ParamSpec, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tg_tinker.errors import TGTinkerError

__all__ = [
    "JSON", "advice_for_people", "format_option", "hint", "human", "say", "show", "show_one", "show_rows", "talk",
    "when",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")

JSON = "json"
_UNBROKEN = 100_000_000  # columns: what grep and its kind read is one line a row


def talk() -> Console:
    """Give the console for people: standard error, so that standard output stays clean for programs."""
    return Console(stderr=True, highlight=False)


def hint(line: str) -> None:
    """Say something beside what was asked for, in one line, so that what it names can be copied."""
    talk().print(line, soft_wrap=True, markup=False)


def human() -> Console:
    """Give the console for what a person asked to see: standard output, as wide as the terminal."""
    return Console(highlight=False)


def show(table: Table) -> None:
    """Print a table; for programs no row is broken, nor padded at its end."""
    if sys.stdout.isatty():
        human().print(table)
        return
    wide = Console(highlight=False, width=_UNBROKEN)
    with wide.capture() as printed:
        wide.print(table)
    for line in printed.get().removesuffix("\n").split("\n"):
        click.echo(line.rstrip())


def format_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add ``--format table|json`` to a command, as its parameter ``output``."""
    option = click.option(
        "--format",
        "output",
        type=click.Choice(["table", JSON]),
        default="table",
        show_default=True,
        help="For people or programs.",
    )
    return option(function)


def show_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], output: str) -> None:
    """Print rows: as a JSON list with every field, or as a table of the named columns (field -> heading).

    The first column names the row and is never broken, so that it can be copied; for programs no line is.
    """
    if output == JSON:
        click.echo(json.dumps(list(rows), indent=2, default=str))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(columns.values()):
        table.add_column(heading, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(_cell(row.get(field))) for field in columns))
    show(table)


def show_one(fields: Mapping[str, Any], output: str) -> None:
    """Print one thing: as a JSON object, or as a line for each field that has a value."""
    if output == JSON:
        click.echo(json.dumps(dict(fields), indent=2, default=str))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("field", style="bold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for field, value in fields.items():
        if value is not None:
            table.add_row(Text(field), Text(value if isinstance(value, str) else json.dumps(value, default=str)))
    show(table)


def say(line: str, done: Mapping[str, Any] | Sequence[Mapping[str, Any]], output: str) -> None:
    """Say what was done: as JSON, or as a line with the fields put in, for each of several things one."""
    if output == JSON:
        click.echo(json.dumps(done, indent=2, default=str))
        return
    for fields in [done] if isinstance(done, Mapping) else done:
        click.echo(line.format(**fields))


def when(time: datetime | None) -> str | None:
    """Write a time for people: local, to the second."""
    return None if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def advice_for_people(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the package's own errors into one line on standard error and exit code 1; a traceback helps nobody here."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TGTinkerError as error:
            message = str(error)
        except BrokenPipeError:  # `| head` has read enough: click ends without a word
            raise
        except OSError as error:  # a disk, a folder, a permission: nothing that a traceback would explain
            message = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        talk().print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)
        sys.exit(1)

    return guarded


def _cell(value: object) -> str:
    return "" if value is None else str(value)
