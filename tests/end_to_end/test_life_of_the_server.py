"""How the embedded server lives and dies: killed children, killed parents, two programs, forks, ends of programs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from fixtures.programs import BATCH, MODEL, PATIENCE, program, tg_config

from tg_tinker import ServerRestartedError, ServiceClient, TGTinkerError
from tg_tinker.embedded import server_of

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

TRAIN = """
service = ServiceClient(home=HOME)
tc = service.create_training_client(tg_config())
print(tc.forward_backward(BATCH).result(timeout=100).loss, flush=True)
"""


def finish(running: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a program's end; what it printed. Its standard error must be empty."""
    with running:
        out, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err) == (code, "")
    return out


def wait_until_gone(pid: int, seconds: float = 20.0) -> None:
    """Wait for the end of a process that is no child of ours."""
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(
        encoding="utf-8"
    ):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


async def test_a_killed_server_fails_what_is_pending_and_is_started_again(tmp_path: Path) -> None:
    """Within two seconds every pending future says how the server ended; the next call finds a new server."""
    async with ServiceClient(home=tmp_path) as service:
        tc = await service.create_training_client_async(tg_config())
        futures = [await tc.forward_backward_async({"input_ids": [[1] * 1000] * 16}) for _ in range(20)]
        waits = [asyncio.create_task(future.result_async()) for future in futures]
        await futures[0]
        process = server_of(tmp_path).process
        assert process is not None
        began = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
        assert time.monotonic() - began < 2.0
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert failures
        assert {type(failure) for failure in failures} == {ServerRestartedError}
        assert {failure.exit_code for failure in failures if isinstance(failure, ServerRestartedError)} == {-9}
        assert "serving" in str(failures[0])  # the end of the log
        again = await service.create_training_client_async(tg_config())
        assert (await again.forward_backward(BATCH)).loss > 0
        with pytest.raises(TGTinkerError):
            await tc.refresh_async()  # that run went with its server


def test_the_server_ends_when_its_program_is_killed(tmp_path: Path) -> None:
    """After ``kill -9`` of the program its server is gone too."""
    code = f"{TRAIN}\nfrom tg_tinker.embedded import server_of\nfrom pathlib import Path\n"
    code += "print(server_of(Path(HOME)).process.pid, flush=True)\ntime.sleep(300)\n"
    with program(tmp_path, code) as running:
        assert running.stdout is not None
        assert float(running.stdout.readline()) > 0
        server = int(running.stdout.readline())
        running.kill()
        running.communicate()
    wait_until_gone(server)


def test_two_programs_share_a_home(tmp_path: Path) -> None:
    """Each program has a server of its own on the same home; what one saved or computed the other finds."""
    save = f"""{TRAIN}
print(tc.save_state(metadata={{"by": "one"}}).artifact_id)
print(tc.forward_backward(BATCH).id, flush=True)
sys.stdin.read()
service.close()
"""
    with program(tmp_path, save) as one:
        assert one.stdout is not None
        loss, artifact, future = (one.stdout.readline().strip() for _ in range(3))
        load = f"""{TRAIN}
print(tc.load_state({artifact!r}).metadata["by"])
print(service.get_future({future!r}).result(timeout=60).loss)
service.close()
"""
        out = finish(program(tmp_path, load)).split()
        assert (out[1], float(out[2])) == ("one", pytest.approx(float(loss)))
        out_of_one = one.communicate("", timeout=PATIENCE)
    assert (one.returncode, out_of_one) == (0, ("", ""))


def test_a_future_is_found_after_the_program_was_restarted(tmp_path: Path) -> None:
    """A finished operation gives its result again; one that had not finished says that its server is gone."""
    first = f"""{TRAIN}
done = tc.forward_backward(BATCH)
done.result(timeout=100)
print(done.id)
futures = [tc.forward_backward({{"input_ids": [[1] * 1000] * 16}}) for _ in range(20)]
print(futures[-1].id, flush=True)
os.kill(os.getpid(), 9)
"""
    with program(tmp_path, first) as one:
        out = one.communicate(timeout=PATIENCE)[0].split()
    loss, done, unfinished = out
    second = f"""
    with ServiceClient(home=HOME) as service:
        print(service.get_future({done!r}).result(timeout=60).loss)
        try:
            service.get_future({unfinished!r}).result(timeout=60)
        except ServerRestartedError as error:
            print("gone")
    """
    again = finish(program(tmp_path, second)).split()
    assert (float(again[0]), again[1:]) == (pytest.approx(float(loss)), ["gone"])


def test_a_program_that_closes_nothing_ends_cleanly(tmp_path: Path) -> None:
    """With operations still on their way the program ends quickly, without a word, and its server with it."""
    code = f"""{TRAIN}
from tg_tinker.embedded import server_of
from pathlib import Path
futures = [tc.forward_backward({{"input_ids": [[1] * 1000] * 16}}) for _ in range(20)]
print(server_of(Path(HOME)).process.pid, flush=True)
"""
    out = finish(program(tmp_path, code)).split()
    wait_until_gone(int(out[1]))


@pytest.mark.fork
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_a_forked_child_trains_beside_its_parent(tmp_path: Path) -> None:
    """Parent and child train the same run on the same server, which counts both; the child's end hurts nobody."""
    code = """
    import warnings
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # newer Pythons warn of any fork beside threads
    service = ServiceClient(home=HOME)
    tc = service.create_training_client(tg_config())
    def step():
        tc.forward_backward(BATCH)
        tc.optim_step().result(timeout=100)
    step()
    child = os.fork()
    if child == 0:
        step()
        sys.exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    step()
    print(tc.refresh().step)
    service.close()
    """
    assert finish(program(tmp_path, code)) == "3\n"


def test_creating_a_client_tells_its_stages(service: ServiceClient, home: Path) -> None:
    """Progress goes from load to ready; a progress function that fails does not fail the creation."""
    told: list[tuple[str, str]] = []
    with ServiceClient(home=home, progress=lambda stage, text: told.append((stage, text))) as client:
        client.create_training_client(tg_config())
    assert [stage for stage, _ in told] == ["load", "ready"]
    assert all(MODEL in text for _, text in told)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with ServiceClient(home=home, progress=broken) as client:
        assert client.create_lora_training_client(MODEL, 2).run_id


def test_plain_use_lives_on_one_thread(service: ServiceClient, home: Path) -> None:
    """Two plain clients share one loop thread."""
    before = {thread.name for thread in threading.enumerate()}
    with ServiceClient(home=home) as client:
        client.get_server_capabilities()
        assert {thread.name for thread in threading.enumerate()} == before
    assert service.get_server_capabilities()


def test_async_with_starts_no_thread(home: Path) -> None:
    """A program that uses ``async with`` alone never starts the loop thread."""
    code = """
    import asyncio, threading
    async def main():
        async with ServiceClient(home=HOME) as service:
            tc = await service.create_training_client_async(tg_config())
            await tc.forward_backward(BATCH)
            print("tg-tinker-loop" in {thread.name for thread in threading.enumerate()})
    asyncio.run(main())
    """
    assert finish(program(home, code, dev=False)) == "False\n"
