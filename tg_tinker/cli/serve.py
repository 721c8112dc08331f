"""``tg-tinker serve``: the server of ``ServiceClient()``, standing on its own for other programs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from tg_tinker.cli import output as out
from tg_tinker.errors import OperationFailedError

__all__ = ["command"]


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 lets the system choose."
)
@click.option("--home", type=click.Path(path_type=Path), help="Folder for models, runs, checkpoints and keys.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or a GPU of this machine.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; without it the fastest number is chosen.")
@click.option("--slots", default=64, show_default=True, type=click.IntRange(1), help="Samples decoded at once.")
@click.option("--verbose", is_flag=True, help="Log every operation.")
@out.advice_for_people
def command(
    host: str, port: int, home: Path | None, device: str, threads: int | None, slots: int, *, verbose: bool
) -> None:
    """Run the server for other programs, until Ctrl-C.

    They reach it by ServiceClient(base_url=...), or by TG_TINKER_BASE_URL.
    """
    from tg_tinker.embedded.process import require_server_extra
    from tg_tinker.home import folder

    require_server_extra()
    from tg_tinker.server import process
    from tg_tinker.server.settings import Settings

    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    settings = Settings(home=folder(home), host=host, port=port, device=device, threads=threads, slots=slots)
    try:
        process.run(settings, on_ready=_announce)
    except OSError as error:
        message = f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port, or 0 for any"
        raise OperationFailedError(message, operation="serve") from error


def _announce(url: str) -> None:
    """Say where the server is and how to reach it, in a form that a shell can copy."""
    click.echo(f"serving at {url}; Ctrl-C ends it")
    click.echo(f"export TG_TINKER_BASE_URL={url}", err=True)
