"""The embedded server as clients share it, with a small program standing in for the server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.children import DIES, LISTENS, SILENT, listening, stand_in

from tg_tinker import embedded
from tg_tinker.embedded import EmbeddedEndpoint, server_of
from tg_tinker.errors import ClientClosedError, ServerRestartedError, ServerUnreachableError

__all__ = ["listening"]

PATIENCE = 30.0  # seconds that a program may take to start on a busy machine


@pytest.fixture(autouse=True)
def nothing_runs_on(tmp_path: Path) -> Iterator[None]:
    """Whatever a test leaves running is ended with it."""
    yield
    server_of(tmp_path).stop(0.0)
    embedded._servers.pop(tmp_path, None)


def endpoint(
    home: Path, *, ready_timeout: float = PATIENCE, said: list[tuple[str, str]] | None = None
) -> EmbeddedEndpoint:
    """A client's way to the server of ``home``."""
    reports = [] if said is None else said
    return EmbeddedEndpoint(home, ready_timeout=ready_timeout, report=lambda stage, text: reports.append((stage, text)))


@pytest.mark.usefixtures("listening")
async def test_clients_of_one_home_share_one_server(tmp_path: Path) -> None:
    """Two clients that start at once get the same process; it ends with the second one that is closed."""
    said: list[tuple[str, str]] = []
    one, two = endpoint(tmp_path, said=said), endpoint(tmp_path)
    assert set(await asyncio.gather(one.resolve(), two.resolve())) == {await one.resolve()}
    process = server_of(tmp_path).process
    assert process is not None
    assert [stage for stage, _ in said] == ["server", "load", "server"]
    await one.aclose()
    assert process.alive()
    await two.aclose()
    assert process.ended.is_set()
    with pytest.raises(ClientClosedError):
        await one.resolve()


@pytest.mark.usefixtures("listening")
async def test_the_next_use_after_a_death_starts_another(tmp_path: Path) -> None:
    """A broken connection is explained by the death of the process, and the next use has a new process and key."""
    client = endpoint(tmp_path)
    url, key = await client.resolve()
    process = server_of(tmp_path).process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    told = await client.explain(ConnectionResetError())
    assert isinstance(told, ServerRestartedError)
    assert told.exit_code == -signal.SIGKILL
    assert await client.resolve() != (url, key)
    late = await client.explain(ConnectionResetError())
    assert isinstance(late, ServerRestartedError)
    await client.aclose()


@pytest.mark.usefixtures("listening")
async def test_a_server_that_lives_explains_nothing(tmp_path: Path) -> None:
    """A connection that broke though the server lives is tried again by the transport, not explained away."""
    client = endpoint(tmp_path)
    await client.resolve()
    assert await client.explain(ConnectionResetError()) is None
    await client.aclose()


async def test_a_start_that_fails_is_an_error_with_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller learns why the server did not start, and the next call tries again."""
    stand_in(monkeypatch, DIES)
    client = endpoint(tmp_path)
    with pytest.raises(ServerUnreachableError, match="no disk left"):
        await client.resolve()
    stand_in(monkeypatch, LISTENS)
    assert (await client.resolve())[0].startswith("http://")
    await client.aclose()


async def test_a_home_that_cannot_be_used_is_told_in_a_line(tmp_path: Path) -> None:
    """What is wrong with the home is the end of the server's log, without a traceback around it."""
    (tmp_path / "tg-tinker.db").write_bytes(b"mine" * 1000)
    client = endpoint(tmp_path)
    with pytest.raises(ServerUnreachableError, match=r"tg-tinker\.db cannot be used") as caught:
        await client.resolve()
    assert "Traceback" not in caught.value.message
    await client.aclose()


async def test_a_start_has_a_timeout_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never becomes ready is given up after ``ready_timeout``."""
    stand_in(monkeypatch, SILENT)
    client = endpoint(tmp_path, ready_timeout=0.2)
    with pytest.raises(ServerUnreachableError, match="ready_timeout"):
        await client.resolve()
    await client.aclose()


PROGRAM = """
import asyncio, os, sys
from pathlib import Path
sys.path.append({tests!r})
from fixtures.children import LISTENS, stand_in
import pytest
from tg_tinker.embedded import EmbeddedEndpoint, server_of
stand_in(pytest.MonkeyPatch(), LISTENS)
home = Path({home!r})
client = EmbeddedEndpoint(home, ready_timeout=30.0, report=lambda *_: None)
asyncio.run(client.resolve())
process = server_of(home).process
print(process.pid, flush=True)
{rest}
"""


def run(home: Path, rest: str) -> subprocess.Popen[bytes]:
    """A program that starts a server and then does ``rest``."""
    code = PROGRAM.format(tests=str(Path(__file__).parents[1]), home=str(home), rest=rest)
    return subprocess.Popen([sys.executable, "-X", "dev", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def gone(pid: int) -> bool:
    """Whether a process that is no child of ours has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")


async def until_gone(pid: int) -> None:
    """Wait until a process has ended."""
    async with asyncio.timeout(PATIENCE):
        while not gone(pid):
            await asyncio.sleep(0.02)


async def test_the_server_ends_with_the_program(tmp_path: Path) -> None:
    """A program that closes nothing leaves no server behind and says nothing at its end."""
    with run(tmp_path, "") as program:
        out, err = program.communicate(timeout=PATIENCE)
    assert (program.returncode, err) == (0, b"")
    await until_gone(int(out))


@pytest.mark.fork
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
async def test_a_forked_child_leaves_the_server_alone(tmp_path: Path) -> None:
    """A child that uses its parent's server and ends by ``sys.exit`` neither stops it nor starts another."""
    rest = """
import warnings
warnings.filterwarnings("ignore", category=DeprecationWarning)  # newer Pythons warn of any fork beside threads
child = os.fork()
if child == 0:
    assert asyncio.run(client.resolve()) == (process.url, process.key)
    asyncio.run(client.aclose())
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert process.alive()
"""
    with run(tmp_path, rest) as program:
        out, err = program.communicate(timeout=PATIENCE)
    assert (program.returncode, err) == (0, b"")
    await until_gone(int(out))


@pytest.mark.usefixtures("listening")
async def test_a_forgotten_client_gives_its_lease_back(tmp_path: Path) -> None:
    """A client that is collected unclosed keeps nothing: the server ends when the last one is gone."""
    kept, dropped = endpoint(tmp_path), endpoint(tmp_path)
    await kept.resolve()
    await dropped.resolve()
    process = server_of(tmp_path).process
    assert process is not None
    del dropped
    assert await process.ended.wait_async(0.2) is False
    del kept
    assert await process.ended.wait_async(PATIENCE)


@pytest.mark.usefixtures("listening")
async def test_a_client_that_never_called_ends_no_server(tmp_path: Path) -> None:
    """One that is collected before it had a lease leaves the server to those who have."""
    kept, dropped = endpoint(tmp_path), endpoint(tmp_path)
    await kept.resolve()
    process = server_of(tmp_path).process
    assert process is not None
    del dropped
    assert await process.ended.wait_async(0.2) is False
    await kept.aclose()
    assert process.ended.is_set()
