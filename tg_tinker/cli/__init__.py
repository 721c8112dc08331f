"""The ``tg-tinker`` command. A subcommand's module is loaded when it is called, so help and completion are instant."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import click

__all__ = ["main"]

#: name -> (module that holds it as ``command``, what the help says)
COMMANDS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "artifacts": ("tg_tinker.cli.artifacts", "List, pull and open sealed checkpoints; look after their keys."),
        "audit": ("tg_tinker.cli.audit", "Read the audit log and verify it."),
        "clients": ("tg_tinker.cli.clients", "List, look at and delete training runs."),
        "demo": (
            "tg_tinker.cli.demo",
            "Teach a small model something new on this machine: the whole product in minutes.",
        ),
        "doctor": ("tg_tinker.cli.doctor", "Say what is installed here, what is missing, and what to do about it."),
        "futures": ("tg_tinker.cli.futures", "List, look at and cancel operations."),
        "keys": ("tg_tinker.cli.keys", "Make, list and revoke the API keys of a server over this home."),
        "models": ("tg_tinker.cli.models", "List the built-in models and fetch them."),
        "serve": ("tg_tinker.cli.serve", "Run the server for other programs and machines."),
    }
)


class Commands(click.Group):
    """A group whose members are loaded by name, on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the subcommands without loading any."""
        del ctx
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one subcommand."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name][0]}.command must be a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tg-tinker", prog_name="tg-tinker")
def main() -> None:
    """Train and sample language models step by step.

    Start with `tg-tinker demo`; `tg-tinker doctor` says what this machine lacks.
    """
