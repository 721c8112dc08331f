"""One ``python -m tg_tinker.server`` run as a child: started, watched, its log kept, ended.

It imports nothing of the server and knows no event loop: threads wait on it, coroutines through its latches.
Which child serves whom is ``embedded``'s business.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, time
from urllib.parse import urlsplit

from tg_tinker.errors import InvalidRequestError, ServerRestartedError, ServerUnreachableError
from tg_tinker.threads.latch import Latch

__all__ = ["KEY_VARIABLE", "ServerProcess", "require_server_extra"]

KEY_VARIABLE = "TG_TINKER_EMBEDDED_KEY"
KEPT_LOGS = 10
TAIL = 4000  # characters of the log that errors show
_KNOCK = 0.5  # seconds
_NEEDED = ("torch", "peft", "safetensors", "sqlalchemy", "aiosqlite", "cryptography", "tink")


def require_server_extra() -> None:
    """Check, without importing it, that what the server needs is installed; the error says how to get it."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        message = (
            f"a server on this machine needs {', '.join(missing)}: pip install 'tg-tinker[server]'; "
            "for a server elsewhere give its base_url"
        )
        raise ServerUnreachableError(message)


class ServerProcess:
    """A child process that serves ``home`` on a loopback port, under a key that only this program knows."""

    def __init__(self, home: Path, *, report: Callable[[str, str], None]) -> None:
        require_server_extra()
        self.key = secrets.token_urlsafe(32)
        self.url = ""
        self.owner = os.getpid()
        self.ready = Latch()  # it answers, or has ended
        self.ended = Latch()
        self.exit_code: int | None = None
        self._report = report
        self._log = _new_log(home / "logs")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                _command(home, self.owner),
                env={**os.environ, KEY_VARIABLE: self.key},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for the program: it may well go on
            )
        threading.Thread(target=self._watch, name="tg-tinker-server-watch", daemon=True).start()

    def __repr__(self) -> str:
        """Where it serves, or how it ended."""
        state = f"exit code {self.exit_code}" if self.ended.is_set() else self.url or "starting"
        return f"<ServerProcess {self._process.pid}: {state}>"

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it serves, as far as is known here; it may have died this very moment."""
        if os.getpid() != self.owner:
            return bool(self.url) and self._answers()
        return self.ready.is_set() and not self.ended.is_set()

    def usable(self) -> bool:
        """Whether it serves, or will soon; a forked child does not wait for what its parent is starting."""
        return self.alive() or (os.getpid() == self.owner and not self.ended.is_set())

    def _answers(self) -> bool:
        """Whether anything listens at its port: all that a forked child, to whom it is no child, can ask."""
        address = urlsplit(self.url)
        try:
            with socket.create_connection((address.hostname or "", address.port or 0), timeout=_KNOCK):
                return True
        except OSError:
            return False

    def _watch(self) -> None:
        """Take what the child says on its standard output, until it ends."""
        with contextlib.closing(self._process.stdout or io.BytesIO()) as lines:
            for line in lines:
                self._hear(line)
        self.exit_code = self._process.wait()
        self.ended.set()
        self.ready.set()

    def _hear(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, AttributeError):  # libraries print to standard output too
            said = json.loads(line)
            if said.get("url"):
                self.url = str(said["url"])
                self.ready.set()
            elif said.get("stage"):
                self._report("load", str(said["stage"]))

    def check_ready(self, waited: float) -> None:
        """Raise ``ServerUnreachableError``, with the end of the log, unless it serves."""
        if self.alive():
            return
        if self.ended.is_set():
            message = f"the server on this machine ended with exit code {self.exit_code} before it was ready"
        else:
            message = f"the server on this machine was not ready after {waited:.0f} s (ready_timeout)"
        raise ServerUnreachableError(f"{message}; the end of its log {self._log}:\n{self.log_tail()}")

    def death(self) -> ServerRestartedError | None:
        """What to say of its end, or None where it has not ended."""
        if os.getpid() != self.owner:
            gone = f"the server of the parent process {self.owner} is gone; the next call starts another"
            return None if self.alive() else ServerRestartedError(gone)
        if not self.ended.is_set():
            return None
        tail = self.log_tail()
        message = f"the server on this machine ended with exit code {self.exit_code}; the next call starts another"
        shown = f"; the end of its log {self._log}:\n{tail}" if tail else f"; its log {self._log} is empty"
        return ServerRestartedError(message + shown, exit_code=self.exit_code, log_tail=tail)

    def log_tail(self) -> str:
        """The last lines of what it wrote to its standard error."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._log.stat().st_size - TAIL))
                return log.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def stop(self, patience: float) -> None:
        """End it: ask, wait ``patience`` seconds, kill. In a forked child this does nothing: it is not ours to end."""
        if os.getpid() != self.owner or self.ended.is_set():
            return
        deadline = monotonic() + patience
        with contextlib.suppress(OSError):  # it ended in between
            self._process.terminate()
        if not self.ended.wait(max(0.0, deadline - monotonic())):
            with contextlib.suppress(OSError):
                self._process.kill()
            self.ended.wait(1.0)


def _command(home: Path, parent: int) -> list[str]:
    """How the server is started; its key is in the environment alone, where no list of processes shows it."""
    return [sys.executable, "-m", "tg_tinker.server", "--home", str(home), "--parent", str(parent)]


def _new_log(folder: Path) -> Path:
    """A file for the log of a new server; of older ones the newest few are kept.

    Raises ``InvalidRequestError`` where the home is no folder that could be written to.
    """
    try:
        for place in (folder.parent, folder):  # one by one: ``parents=True`` would leave the home open to others
            if not place.exists():
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        message = f"home: nothing can be kept in {folder.parent}: {error.strerror}"
        raise InvalidRequestError(message, field="home", constraint="a folder that can be written to") from error
    old = sorted(folder.glob("server-*.log"))
    for path in old[: max(0, len(old) - KEPT_LOGS + 1)]:
        with contextlib.suppress(OSError):  # another program may have tidied up, or on Windows still write to it
            path.unlink()
    return folder / f"server-{time():.0f}-{os.getpid()}-{secrets.token_hex(2)}.log"
