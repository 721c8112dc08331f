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

import attrs
import pytest
from click.testing import CliRunner

from tg_tinker.cli import main, serve
from tg_tinker.server.settings import Settings

SERVE = [sys.executable, "-W", "error", "-m", "tg_tinker.cli", "serve"]


@pytest.mark.slow
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
        with urllib.request.urlopen(f"{url}/healthz", timeout=60) as answer:
            assert answer.status == 200
            json.load(answer)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        assert server.stderr.read() == f"export TG_TINKER_BASE_URL={url}\n"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_request_is_found_in_the_log(tmp_path: Path) -> None:
    """With --verbose every request is a line under its id."""
    command = [*SERVE, "--port", "0", "--home", str(tmp_path), "--verbose"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[2].rstrip(";")
        asked = urllib.request.Request(f"{url}/v1/health", headers={"X-Request-Id": "find-me"})
        with urllib.request.urlopen(asked, timeout=10) as answer:
            assert answer.status == 200
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=30)
    assert "DEBUG tg_tinker.server GET /v1/health [find-me] of nobody: 200\n" in said


def refusal(*options: str) -> str:
    """Start a server that must not come up, and give what it says."""
    result = subprocess.run([*SERVE, *options], capture_output=True, check=False, text=True, timeout=50)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.slow
def test_other_machines_are_not_served_without_a_key(tmp_path: Path) -> None:
    """An address that others can reach is refused, with the reason."""
    assert "no usable API key" in refusal("--host", "0.0.0.0", "--home", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", ["0.0.0.0", "[::]"])
def test_other_machines_are_told_a_name(capsys: pytest.CaptureFixture[str], everywhere: str) -> None:
    """What is printed for others to copy names this machine; no other one could connect to "every address"."""
    serve._announce(f"http://{everywhere}:8000")
    assert capsys.readouterr().err == f"export TG_TINKER_BASE_URL=http://{socket.gethostname()}:8000\n"


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    """A port that somebody else listens on is an error of one line that says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal("--port", str(port), "--home", str(tmp_path))
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "--port" in said


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_device_that_is_not_here_is_told(tmp_path: Path) -> None:
    """A device that this machine lacks ends the server, rather than every request to it with an error."""
    said = refusal("--device", "tpu", "--port", "0", "--home", str(tmp_path))
    assert said.splitlines()[-1] == "Error: device 'tpu' is not available here"


def chosen(monkeypatch: pytest.MonkeyPatch, *options: str) -> Settings:
    """The settings that a server would be started with."""
    seen: list[Settings] = []
    monkeypatch.setattr("tg_tinker.server.process.run", lambda settings, **_: seen.append(settings))
    result = CliRunner().invoke(main, ["serve", *options])
    assert result.exit_code == 0, result.output
    (settings,) = seen
    return settings


def test_what_is_not_said_is_as_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without options a server is set up as ``Settings`` says, but for its port."""
    assert chosen(monkeypatch, "--home", str(tmp_path)) == attrs.evolve(Settings(home=tmp_path), port=8000)


def test_every_option_reaches_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever an operator can choose arrives; sizes are given in GB, names and folders as often as needed."""
    words = """--host=::1 --port=0 --require-key --allowed-hosts=box --allowed-hosts=box.lan --device=cpu --threads=2
        --slots=8 --queue-limit=9 --requests-per-minute=60 --quota-gb=1.5 --aside-gb=0.5 --idle=60"""
    settings = chosen(monkeypatch, "--home", str(tmp_path), "--model-folders", str(tmp_path), *words.split())
    assert settings == Settings(
        home=tmp_path, host="::1", require_key=True, allowed_hosts=("box", "box.lan"), model_folders=(tmp_path,),
        device="cpu", threads=2, slots=8, queue_limit=9, requests_per_minute=60, quota_bytes=1_500_000_000,
        aside_bytes=500_000_000, idle=60.0,
    )  # fmt: skip


def test_wrong_options_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that is not there and a size of nothing are refused by name."""
    for option, value in (("--model-folders", str(tmp_path / "none")), ("--quota-gb", "0"), ("--idle", "-1")):
        result = CliRunner().invoke(main, ["serve", option, value])
        assert result.exit_code == 2
        assert option in result.output
