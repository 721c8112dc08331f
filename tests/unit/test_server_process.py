"""One server process, with small programs standing in for the server."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures.children import DIES, LISTENS, SILENT, STUBBORN, stand_in

from tg_tinker.embedded import process as server_process
from tg_tinker.embedded.process import ServerProcess
from tg_tinker.errors import InvalidRequestError, ServerRestartedError, ServerUnreachableError

Start = Callable[[str], ServerProcess]
PATIENCE = 30.0  # seconds that a program may take to start on a busy machine


@pytest.fixture
def said() -> list[tuple[str, str]]:
    """What the process reported."""
    return []


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: list[tuple[str, str]]) -> Iterator[Start]:
    """Start a program in place of the server; it is ended with the test."""
    started: list[ServerProcess] = []

    def begin(program: str) -> ServerProcess:
        stand_in(monkeypatch, program)
        started.append(ServerProcess(tmp_path, report=lambda stage, text: said.append((stage, text))))
        return started[-1]

    yield begin
    for process in started:
        process.stop(0.0)


def test_a_server_is_ready_once_it_says_where_it_listens(start: Start, said: list[tuple[str, str]]) -> None:
    """The URL is taken from its ready line, stages are reported, and other output is passed over."""
    process = start(LISTENS)
    assert process.ready.wait(PATIENCE)
    process.check_ready(0.0)
    assert process.alive()
    assert process.url.startswith("http://127.0.0.1:")
    assert repr(process) == f"<ServerProcess {process.pid}: {process.url}>"
    assert said == [("load", "loading something")]
    assert process.death() is None
    assert process.log_tail() == "the key is in the environment: True"


def test_the_key_is_not_on_the_command_line(start: Start) -> None:
    """A list of processes shows no key."""
    process = start(LISTENS)
    assert process.ready.wait(PATIENCE)
    assert process.key not in Path(f"/proc/{process.pid}/cmdline").read_text(encoding="utf-8")


@pytest.mark.skipif(not hasattr(os, "getpgid"), reason="POSIX only")
def test_ctrl_c_in_a_terminal_does_not_reach_it(start: Start) -> None:
    """The process is in a group of its own, so an interrupted program can go on with its server."""
    process = start(LISTENS)
    assert process.ready.wait(PATIENCE)
    assert os.getpgid(process.pid) != os.getpgid(0)


def test_stopping_waits_for_the_end(start: Start) -> None:
    """After ``stop`` the process is gone, and a second ``stop`` does nothing."""
    process = start(LISTENS)
    assert process.ready.wait(PATIENCE)
    process.stop(PATIENCE)
    assert process.ended.is_set()
    assert process.exit_code == -signal.SIGTERM
    process.stop(PATIENCE)


def test_a_process_that_will_not_end_is_killed(start: Start) -> None:
    """One that ignores the request to end is killed once patience is over."""
    process = start(STUBBORN)
    assert process.ready.wait(PATIENCE)
    process.stop(0.2)
    assert process.ended.wait(PATIENCE)
    assert process.exit_code == -signal.SIGKILL


def test_a_start_that_fails_shows_exit_code_and_log(start: Start) -> None:
    """The error of a server that ends before it is ready says how, and shows the end of its log."""
    process = start(DIES)
    assert process.ready.wait(PATIENCE)
    with pytest.raises(ServerUnreachableError, match=r"exit code 3 before it was ready(?s:.*)no disk left"):
        process.check_ready(0.5)


def test_a_start_that_takes_too_long_names_the_limit(start: Start) -> None:
    """A server that says nothing is given up after the ready timeout."""
    process = start(SILENT)
    assert not process.ready.wait(0.1)
    with pytest.raises(ServerUnreachableError, match="not ready after 5 s"):
        process.check_ready(5.0)


def test_a_death_is_told_with_exit_code_and_log(start: Start) -> None:
    """A server that was killed is reported as restarted, with what it last said."""
    process = start(LISTENS)
    assert process.ready.wait(PATIENCE)
    os.kill(process.pid, signal.SIGKILL)
    assert process.ended.wait(PATIENCE)
    death = process.death()
    assert isinstance(death, ServerRestartedError)
    assert death.exit_code == -signal.SIGKILL
    assert "the key is in the environment" in death.log_tail
    assert not process.alive()
    assert not process.usable()
    assert "exit code -9" in repr(process)


@pytest.mark.fork
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_a_forked_child_uses_the_process_but_never_ends_it(start: Start) -> None:
    """In a forked child the process is alive as long as it listens, and ``stop`` leaves it alone."""
    process = start(LISTENS)
    assert process.ready.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        good = process.alive() and process.usable() and process.death() is None
        process.stop(0.0)
        os._exit(0 if good and process.alive() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert process.alive()
    process.stop(PATIENCE)


def test_what_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the server's libraries the error says what to install, and what to do instead."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(ServerUnreachableError, match=r"torch: pip install 'tg-tinker\[server\]'; .* give its base_url"):
        server_process.require_server_extra()


def test_a_home_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    """A file in the place of the home is an error that names the setting, and nothing is started."""
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequestError, match="Not a directory") as caught:
        ServerProcess(tmp_path / "file", report=lambda *_: None)
    assert caught.value.field == "home"


def test_old_logs_are_tidied_away(start: Start, tmp_path: Path) -> None:
    """Only the newest few logs of servers stay."""
    folder = tmp_path / "logs"
    folder.mkdir()
    for number in range(15):
        (folder / f"server-{number}.log").touch()
    start(DIES).ended.wait(PATIENCE)
    assert len(list(folder.iterdir())) == server_process.KEPT_LOGS
