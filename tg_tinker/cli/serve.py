"""``tg-tinker serve``: the server of ``ServiceClient()``, standing on its own for other programs."""

from __future__ import annotations

import logging
import re
import socket
import sys
from pathlib import Path
from typing import Any

import click

from tg_tinker.cli import local_files
from tg_tinker.cli import output as out
from tg_tinker.errors import OperationFailedError

__all__ = ["command"]

_GB = 1_000_000_000
_SIZE = click.FloatRange(0.0, min_open=True)


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 lets the system choose."
)
@click.option("--home", type=click.Path(path_type=Path), help="Folder for models, runs, checkpoints and keys.")
@click.option("--require-key", is_flag=True, help="Serve nobody without an API key, also before there is one.")
@click.option(
    "--allowed-hosts", metavar="NAME", multiple=True,
    help="Another name of this machine that requests and web pages may use; may be given again.",
)  # fmt: skip
@click.option(
    "--model-folders", metavar="FOLDER", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Below it models may be loaded from by other machines; may be given again.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or a GPU of this machine.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; without it the fastest number is chosen.")
@click.option("--slots", default=64, show_default=True, type=click.IntRange(1), help="Samples decoded at once.")
@click.option(
    "--queue-limit", default=4096, show_default=True, type=click.IntRange(1),
    help="Operations, and samples, that a tenant may have under way.",
)  # fmt: skip
@click.option("--requests-per-minute", type=click.IntRange(1), help="Of each tenant; without it, any number.")
@click.option("--quota-gb", type=_SIZE, help="Checkpoints that a tenant may store; without it, any number.")
@click.option(
    "--aside-gb", default=4.0, show_default=True, type=_SIZE,
    help="Versions of a run to keep for those who are pinned to them when their names have moved on.",
)  # fmt: skip
@click.option(
    "--idle", default=1800.0, show_default=True, type=click.FloatRange(0.0), metavar="SECONDS",
    help="How long a base model that nothing uses stays in memory, unless another is loaded.",
)  # fmt: skip
@click.option("--verbose", is_flag=True, help="Log every request and operation.")
@out.advice_for_people
def command(
    host: str, port: int, home: Path | None, quota_gb: float | None, aside_gb: float, *, verbose: bool, **chosen: Any
) -> None:
    """Run the server for other programs, until Ctrl-C.

    They reach it by ServiceClient(base_url=...), or by TG_TINKER_BASE_URL. Addresses that other machines can reach need
    an API key first: `tg-tinker keys create TENANT`.
    """
    from tg_tinker.embedded.process import require_server_extra

    require_server_extra()
    from tg_tinker.server import process
    from tg_tinker.server.settings import Settings

    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    if verbose:
        logging.getLogger("tg_tinker").setLevel(logging.DEBUG)
    quota_bytes = None if quota_gb is None else int(quota_gb * _GB)
    aside_bytes = int(aside_gb * _GB)
    settings = Settings(
        home=local_files.make_home(home),
        host=host,
        port=port,
        quota_bytes=quota_bytes,
        aside_bytes=aside_bytes,
        **chosen,
    )
    try:
        process.run(settings, on_ready=_announce)
    except OSError as error:
        if error.filename is not None:
            raise  # a file's, not the address's
        message = f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port, or 0 for any"
        raise OperationFailedError(message, operation="serve") from error


def _announce(url: str) -> None:
    """Say where the server is and how to reach it, in a form that a shell can copy."""
    click.echo(f"serving at {url}; Ctrl-C ends it")
    # "every address of this machine" is none that another one could connect to
    reachable = re.sub(r"//(0\.0\.0\.0|\[::\])", f"//{socket.gethostname()}", url)
    click.echo(f"export TG_TINKER_BASE_URL={reachable}", err=True)
