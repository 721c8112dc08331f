"""`tg-tinker serve`: it says where it is, serves there, ends at Ctrl-C, and refuses what would be unsafe."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

SERVE = [sys.executable, "-W", "error", "-m", "tg_tinker.cli", "serve"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    """The printed address answers, Ctrl-C ends it with 0, and nothing is said that is no news."""
    with subprocess.Popen(
        [*SERVE, "--port", "0", "--home", str(tmp_path)],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        url = server.stdout.readline().split()[2].rstrip(";")
        with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
            assert answer.status == 200
            json.load(answer)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        assert server.stderr.read() == f"export TG_TINKER_BASE_URL={url}\n"


def refusal(*options: str) -> str:
    """Start a server that must not come up, and give what it says."""
    result = subprocess.run([*SERVE, *options], capture_output=True, check=False, text=True, timeout=50)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_other_machines_are_not_served_without_a_key(tmp_path: Path) -> None:
    """An address that others can reach is refused, with the reason."""
    assert "no API key" in refusal("--host", "0.0.0.0", "--home", str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_taken_port_is_told(tmp_path: Path) -> None:
    """A port that somebody else listens on is an error of one line that says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal("--port", str(port), "--home", str(tmp_path))
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "--port" in said
