"""Where a client lives: the caller's own loop (``LoopHome``), or one daemon loop thread (``ThreadHome``).

A home takes work from any thread and any loop. It knows forks, interpreter exit, Ctrl-C and the calls that would
deadlock; it knows nothing of HTTP or of operations.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Generic, TypeVar, cast

from tg_tinker.errors import BlockingCallError, BlockingCallWarning, ClientClosedError, TGTinkerError
from tg_tinker.threads.caller import user_frame
from tg_tinker.threads.latch import Latch
from tg_tinker.threads.loop_thread import Guest, LoopThread

__all__ = ["Home", "Job", "LoopHome", "ThreadHome", "shutdown"]

T = TypeVar("T")
CANCEL_BUDGET = 1.0  # seconds that an interrupted blocking call waits for its own clean-up


class Job(Generic[T]):
    """One coroutine running at home, seen from any thread: what came of it, and how to stop it."""

    def __init__(
        self,
        work: Coroutine[Any, Any, T],
        name: str | None = None,
        group: set[asyncio.Task[None]] | None = None,
        context: contextvars.Context | None = None,
    ) -> None:
        self._work = work
        self._name = name
        self._group = group
        self._context = context or contextvars.copy_context()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._value: T | None = None
        self._error: BaseException | None = asyncio.CancelledError()  # until it gets to run
        self.ended = Latch()

    def begin(self) -> None:
        """Start the task, in the context of whoever made the job; called on the home's loop."""
        if self._stopped:
            self._end(None)
            return
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._main(), name=self._name, context=self._context)
        if self._group is not None:
            self._group.add(self._task)
        self._task.add_done_callback(self._end)

    async def _main(self) -> None:
        try:
            self._value = await self._work
            self._error = None
        except (SystemExit, KeyboardInterrupt) as error:
            self._error = error
            if threading.current_thread() is threading.main_thread():
                raise  # the user's own loop: it ends as it would have without us
        except BaseException as error:  # noqa: BLE001 - kept for whoever waits for the job, whatever it is
            self._error = error

    def _end(self, task: asyncio.Task[None] | None) -> None:
        if task is not None and not task.cancelled():
            task.exception()  # known to whoever asks the job; asyncio need not report it again
        if self._group is not None and task is not None:
            self._group.discard(task)
        self._work.close()  # for a task that was cancelled before its first step
        self.ended.set()

    def stop(self) -> None:
        """Cancel the task, or keep it from starting; called on the home's loop."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    def error(self) -> BaseException | None:
        """What kept the coroutine from ending well; None where nothing did."""
        return self._error

    def outcome(self) -> T:
        """The coroutine's value, or its error."""
        if self._error is not None:
            raise _bare(self._error)
        return cast("T", self._value)


class Home(ABC):
    """One event loop that owns a client's connections and tasks."""

    @abstractmethod
    def call_soon(self, function: Callable[..., object], /, *args: Any) -> None:
        """Run ``function`` on the home's loop; any thread. Raises ``ClientClosedError`` where the loop is gone."""

    @abstractmethod
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The home's loop; None before it is first needed."""

    @abstractmethod
    def host(self, guest: Guest) -> None:
        """Something was opened on the home's loop that must be closed there at the latest when the loop ends."""

    @abstractmethod
    def unhost(self, guest: Guest) -> None:
        """It was closed."""

    def is_here(self) -> bool:
        """Whether the caller runs on the home's loop."""
        running = _running()
        return running is not None and running is self.loop()

    def spawn(
        self,
        work: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        group: set[asyncio.Task[None]] | None = None,
        context: contextvars.Context | None = None,
    ) -> Job[T]:
        """Start ``work`` at home, in the caller's context or ``context``; ``group`` holds its task while it runs."""
        job = Job(work, name, group, context)
        try:
            self.call_soon(job.begin)
        except BaseException:
            work.close()
            raise
        return job

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` at home and block until it is done; Ctrl-C cancels it and leaves within a second.

        Whoever calls this has called ``check_blocking`` before.
        """
        job = self.spawn(work)
        try:
            job.ended.wait()
        except BaseException:
            self.call_soon(job.stop)
            job.ended.wait(CANCEL_BUDGET)
            raise
        return job.outcome()

    async def hop(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run what ``start`` makes at home and await it; cancelling the caller cancels it and lets it clean up.

        A caller that is cancelled before its first step has made nothing that somebody would have to await.
        """
        if self.is_here():
            try:
                return await start()
            except TGTinkerError as error:
                raise _bare(error)  # noqa: B904 - the same error, without the frames in between
        job = self.spawn(start())
        try:
            await job.ended.wait_async()
        except BaseException as error:
            self.call_soon(job.stop)
            if isinstance(error, asyncio.CancelledError):
                await job.ended.wait_async(CANCEL_BUDGET)
            raise
        return job.outcome()

    def check_blocking(self, what: str) -> None:
        """Raise ``BlockingCallError`` where blocking would deadlock; warn where it stalls somebody else's loop."""
        running = _running()
        if running is None:
            return
        if running is self.loop():
            message = f"{what} would block the event loop that has to do the work: await it, or its *_async form"
            raise BlockingCallError(message)
        if not _in_ipython():
            _warn_once(user_frame(), f"{what} blocks a running event loop: await it, or its *_async form, instead")


class LoopHome(Home):
    """The loop that is running now: no thread, no hop for its own coroutines."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()

    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that was running when the home was made."""
        return self._loop

    def call_soon(self, function: Callable[..., object], /, *args: Any) -> None:
        """Run ``function`` on the loop, with no wake-up needed from the loop's own thread."""
        if os.getpid() != self._pid:
            raise ClientClosedError(f"this client lives on a loop of process {self._pid}: make a new one in this child")
        try:
            if _running() is self._loop:
                self._loop.call_soon(function, *args)
            else:
                self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError as error:
            raise ClientClosedError("the event loop that this client lives on is closed") from error

    def host(self, guest: Guest) -> None:
        """Nothing to do: ``async with`` closes what was opened."""

    def unhost(self, guest: Guest) -> None:
        """Nothing to do."""

    def check_blocking(self, what: str) -> None:
        """As in ``Home``; also refuse to wait for a loop that nobody runs."""
        super().check_blocking(what)
        if not self._loop.is_running():
            raise BlockingCallError(f"{what} would wait for ever: the client's event loop is not running")


class ThreadHome(Home):
    """The shared loop thread of this process; started when first needed, and again should it have ended."""

    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The thread's loop; None while no thread runs."""
        thread = _shared.thread
        return None if thread is None else thread.loop

    def call_soon(self, function: Callable[..., object], /, *args: Any) -> None:
        """Run ``function`` on the thread's loop."""
        while not _shared.live().call_soon(function, *args):
            pass  # it ended in between: the next one takes over

    def host(self, guest: Guest) -> None:
        """Have ``guest`` closed when the thread ends."""
        _shared.live().guests.add(guest)

    def unhost(self, guest: Guest) -> None:
        """Let go of ``guest``."""
        if _shared.thread is not None:
            _shared.thread.guests.discard(guest)


class _Shared:
    """The process's one loop thread, if it runs."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # re-entrant: a finalizer may call us while we allocate
        self.thread: LoopThread | None = None
        self.over = False

    def live(self) -> LoopThread:
        thread = self.thread
        return thread if thread is not None and not thread.ended else self._start()

    def _start(self) -> LoopThread:
        with self.lock:
            if self.over:
                raise ClientClosedError("the interpreter is shutting down")
            if self.thread is None or self.thread.ended:
                self.thread = LoopThread()
                self.thread.start()
            return self.thread


_shared = _Shared()
_inherited: list[LoopThread] = []


def shutdown() -> None:
    """End the loop thread: cancel its tasks, close its connections, wait for it two seconds at most."""
    thread = _shared.thread
    if thread is not None:
        thread.stop()


def _at_exit() -> None:
    _shared.over = True
    shutdown()


def _after_fork() -> None:
    """Forget the parent's thread, loop and connections without closing them: the parent goes on using them."""
    global _shared  # noqa: PLW0603 - a fork copies the process, and with it this one global
    if _shared.thread is not None:
        _shared.thread.abandon()
        _inherited.append(_shared.thread)
    _shared = _Shared()


# At import, so that it runs after the exit handlers of whoever imported us.
atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _bare(error: BaseException) -> BaseException:
    """``error`` without the frames it passed at home, where it is one that speaks for itself."""
    return error.with_traceback(None) if isinstance(error, TGTinkerError) else error


def _in_ipython() -> bool:
    """Whether all user code runs inside a loop anyway, as in a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def _warn_once(frame: FrameType, message: str) -> None:
    """Warn at the user's line; the registry of the warnings module keeps it to once per line."""
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(
        message, BlockingCallWarning, frame.f_code.co_filename, frame.f_lineno, module=module, registry=registry
    )
