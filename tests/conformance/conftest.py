"""Our server, and the published client before it.

Everything here runs in the published client's own environment, where nothing of ours is installed: the server is the
command that ``TG_TINKER_COMMAND`` names. An ordinary run of the tests finds nothing to collect in this folder.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Server(NamedTuple):
    """Where our server is, and the keys of two tenants; none where it serves this machine alone."""

    url: str
    key: str | None = None
    other_key: str | None = None

    def service(self, key: str | None = None) -> Any:
        """A published ServiceClient of this server."""
        from baseten.loops import ServiceClient

        return ServiceClient(base_url=self.url, api_key=key or self.key)


@contextmanager
def serving(home: Path) -> Iterator[str]:
    """Run ``tg-tinker serve`` over a home, and give its URL."""
    command = [os.environ["TG_TINKER_COMMAND"], "serve", "--port", "0", "--home", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("serving at "), said
            yield said.removeprefix("serving at ").partition(";")[0]
        finally:
            process.terminate()


def new_key(home: Path, tenant: str) -> str:
    """An API key of the server over this home."""
    command = [os.environ["TG_TINKER_COMMAND"], "keys", "create", tenant, "--home", str(home), "--format", "json"]
    key = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["key"]
    assert isinstance(key, str)
    return key


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys."""
    home = tmp_path_factory.mktemp("guarded")
    keys = [new_key(home, tenant) for tenant in ("first", "second")]
    with serving(home) as url:
        yield Server(url, *keys)


@pytest.fixture(scope="session")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without keys, for clients that send none."""
    with serving(tmp_path_factory.mktemp("open")) as url:
        yield Server(url)


@pytest.fixture(scope="session")
def service(server: Server) -> Any:
    """The published ServiceClient."""
    return server.service()


@pytest.fixture
def trainer(service: Any) -> Iterator[Any]:
    """A new run of the tiny model."""
    from published import TINY

    with service.create_lora_training_client(base_model=TINY, rank=8, seed=1, ready_timeout=60.0) as made:
        yield made
