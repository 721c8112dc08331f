from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tg_tinker.server.ownership import Ownership


def test_a_name_is_free_when_its_process_is_gone(tmp_path: Path):
    """A live owner is not dead, a released one is, and so is any name that was never one of ours."""
    mine, other = Ownership(tmp_path), Ownership(tmp_path)
    assert not mine.is_dead(mine.name)
    assert not mine.is_dead(other.name)
    other.release()
    assert mine.is_dead(other.name)
    assert mine.is_dead("../../etc/passwd")
    mine.release()


def test_what_killed_servers_left_is_cleared_away(tmp_path: Path):
    """The lock of a process that died is removed, and its name stays dead; those of live ones stay locked."""
    code = (
        "import os, sys; from pathlib import Path; from tg_tinker.server.ownership import Ownership;"
        "print(Ownership(Path(sys.argv[1])).name, flush=True); os._exit(9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=50)
    killed = done.stdout.strip()
    mine, other = Ownership(tmp_path), Ownership(tmp_path)
    assert (tmp_path / "servers" / f"{killed}.lock").exists()
    mine.forget_dead()
    assert {path.stem for path in (tmp_path / "servers").iterdir()} == {mine.name, other.name}
    assert [mine.is_dead(name) for name in (killed, other.name, mine.name)] == [True, False, False]
    other.release()
    mine.release()
