"""How a command reaches a server: the one that its options or the environment name, else one on this machine."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from tg_tinker.cli import output as out

if TYPE_CHECKING:
    from tg_tinker import ServiceClient

__all__ = ["connected", "server_options"]

P = ParamSpec("P")
R = TypeVar("R")


def server_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add ``--base-url`` and ``--api-key`` to a command, as ``base_url`` and ``api_key``."""
    function = click.option(
        "--api-key", metavar="KEY", help="Better given as TG_TINKER_API_KEY: other users can see a command's arguments."
    )(function)
    return click.option(
        "--base-url", metavar="URL", help="The server; else TG_TINKER_BASE_URL, else one is run here over the home."
    )(function)


@contextmanager
def connected(
    base_url: str | None, api_key: str | None, report: Callable[[str], object] | None = None
) -> Generator[ServiceClient]:
    """Give a client, and show meanwhile what it waits for; with ``report`` somebody else shows it."""
    from tg_tinker import ServiceClient

    if report is not None:
        with ServiceClient(api_key, base_url, progress=lambda _, text: report(text)) as service:
            yield service
        return
    with (
        out.talk().status("asking the server ...") as status,
        ServiceClient(api_key, base_url, progress=lambda _, text: status.update(f"{text} ...")) as service,
    ):
        yield service
