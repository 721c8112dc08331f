"""The device thread: every run's training and all sampling take turns on it.

Fair by construction: one micro-batch of each run in turn, then as long for sampling as that micro-batch took. Nothing
polls: an idle device thread waits on a condition. What the operations do is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, TypeVar

from tg_tinker.errors import FutureCancelledError, ServerError
from tg_tinker.server.work.lanes import Job, Lane
from tg_tinker.server.work.operations import Detached, Offline, SamplerLike

T = TypeVar("T")
_log = logging.getLogger("tg_tinker.server")


class Scheduler:
    """Owns the device thread and the threads for offline work."""

    def __init__(
        self,
        *,
        offline_threads: int = 4,
        prepare: Callable[[], None] | None = None,
        on_crash: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._changed = threading.Condition()
        self._round: deque[Lane] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._samplers: list[SamplerLike] = []
        self._closed = False
        self._prepare = prepare
        self._on_crash = on_crash
        self._pool = ThreadPoolExecutor(offline_threads, thread_name_prefix="tg-tinker-offline")
        self._thread = threading.Thread(target=self._main, name="tg-tinker-device", daemon=True)

    # -- from the event loop ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the device thread."""
        self._thread.start()

    def close(self, patience: float = 30.0) -> None:
        """End after the micro-batch that is running; what is queued fails. Blocks until saves under way are durable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)
        self._pool.shutdown(wait=True)

    def submit(self, lane: Lane, job: Job) -> None:
        """Put a job at the end of its run's order."""
        with self._changed:
            if self._closed:
                raise ServerError("the server is shutting down", code="SHUTTING_DOWN")
            lane.jobs.append(job)
            self._take_turn(lane)

    def cancel(self, lane: Lane, job: Job) -> bool:
        """Take a queued job out for good and say True; ask one that runs to stop and say False."""
        with self._changed:
            if job.state == "queued" and job in lane.jobs:
                lane.jobs.remove(job)
                job.drop()
                return True
            job.stopping = True
        if job.state == "detached":
            self.post(lambda: _stop(job))
        return False

    def post(self, call: Callable[[], None]) -> None:
        """Run something short on the device thread soon, outside any run's order; it must not raise."""
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()

    async def call(self, work: Callable[[], T]) -> T:
        """Run something on the device thread soon, outside any run's order, and give what it gives."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = work()
            # Whatever it raises is the caller's, not the device thread's.
            except BaseException as error:  # noqa: BLE001
                tell(loop, settle, future, None, error)
            else:
                tell(loop, settle, future, result, None)

        self.post(run)
        return await future

    def add_sampler(self, sampler: SamplerLike) -> None:
        """Let a model's sampler take part."""
        self.post(lambda: self._samplers.append(sampler))

    def remove_sampler(self, sampler: SamplerLike) -> None:
        """Let go of the sampler of a model that nobody can ask any more."""
        self.post(lambda: self._samplers.remove(sampler))

    # -- on the device thread -----------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            if self._wait():
                if self._prepare is not None:  # not before there is work: it may import what takes long
                    self._prepare()
                self._turns()
        # Operations and samplers keep their errors to themselves: whatever arrives here is the end of this server.
        except BaseException as error:
            _log.critical("the device thread broke down", exc_info=True)
            self._closed = True
            if self._on_crash is not None:
                self._on_crash(error)
            raise

    def _turns(self) -> None:
        """One micro-batch, then sampling, until the scheduler is closed."""
        while self._wait():
            self._run_calls()
            lane = self._next_lane()
            spent = 0.0
            if lane is not None:
                begun = monotonic()
                self._advance(lane)
                spent = monotonic() - begun
            self._sample(spent)

    def _wait(self) -> bool:
        with self._changed:
            while not (self._closed or self._calls or self._round or any(s.busy for s in self._samplers)):
                self._changed.wait()
            return not self._closed

    def _run_calls(self) -> None:
        while self._calls:
            self._calls.popleft()()

    def _next_lane(self) -> Lane | None:
        with self._changed:
            if not self._round:
                return None
            lane = self._round.popleft()
            lane.in_turn = False
            return lane

    def _sample(self, seconds: float) -> None:
        """Step every busy sampler once, and go on until ``seconds`` are used up."""
        deadline = monotonic() + seconds
        while not self._closed:
            busy = [sampler for sampler in self._samplers if sampler.busy]
            for sampler in busy:
                sampler.step()
            if not busy or monotonic() >= deadline:
                return
            self._run_calls()

    def _advance(self, lane: Lane) -> None:
        """Run the lane's current job, or its next one, up to its next yield."""
        job = self._current(lane)
        if job is None:
            return
        try:
            if job.stopping:
                job.close()
                raise FutureCancelledError(f"{job.name} was cancelled while it ran")
            yielded = job.resume()
        except StopIteration as stop:
            self._leave(lane)
            self._conclude(lane, job, stop.value)
        # An operation may raise anything; it is that operation's outcome and nobody else's.
        except BaseException as error:  # noqa: BLE001
            self._leave(lane)
            _fail(job, error)
        else:
            self._give_way(lane, yielded)

    def _current(self, lane: Lane) -> Job | None:
        with self._changed:
            if lane.current is not None or not lane.jobs:
                return lane.current
            job = lane.current = lane.jobs.popleft()
            job.state = "running"
        job.report.started()
        return job

    def _give_way(self, lane: Lane, yielded: Any) -> None:
        with self._changed:
            if isinstance(yielded, Offline):
                lane.waits_for = yielded
                self._start_offline(lane)
            self._take_turn(lane)

    def _leave(self, lane: Lane) -> None:
        with self._changed:
            lane.current = None
            self._take_turn(lane)

    def _take_turn(self, lane: Lane) -> None:
        if lane.runnable and not lane.in_turn:
            lane.in_turn = True
            self._round.append(lane)
            self._changed.notify_all()

    def _conclude(self, lane: Lane, job: Job, value: Any) -> None:
        if isinstance(value, Offline):
            with self._changed:
                lane.finishing.append((job, value))
                if len(lane.finishing) == 1:
                    self._pool.submit(self._finish, lane)
        elif isinstance(value, Detached):
            job.detached, job.state = value, "detached"
            value.begin(lambda result, error: _end(job, result, error))
            if job.stopping:
                value.cancel()
        else:
            _end(job, value, None)

    # -- on offline threads -------------------------------------------------------------------------------------------

    def _start_offline(self, lane: Lane) -> None:
        """Start what the lane's job waits for, once everything that left the lane before it is written."""
        if lane.waits_for is not None and lane.current is not None and not lane.finishing:
            self._pool.submit(self._hand, lane, lane.current, lane.waits_for)

    def _hand(self, lane: Lane, job: Job, offline: Offline[Any]) -> None:
        result, error = _attempt(offline)
        job.hand(result, error)
        with self._changed:
            lane.waits_for = None
            self._take_turn(lane)

    def _finish(self, lane: Lane) -> None:
        """Do what jobs left behind, one after the other: the later of two saves under one name must end last."""
        more = True
        while more:
            job, offline = lane.finishing[0]
            result, error = _attempt(offline)
            _end(job, result, error)
            with self._changed:
                lane.finishing.popleft()
                more = bool(lane.finishing)
                self._start_offline(lane)


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: Any) -> None:
    """Call back on a loop from another thread; a loop that is gone wants to hear nothing."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *arguments)


def _attempt(offline: Offline[Any]) -> tuple[Any, BaseException | None]:
    try:
        return offline.work(), None
    # Like the operation that it is part of: what it raises is that operation's outcome.
    except BaseException as error:  # noqa: BLE001
        return None, error


def _end(job: Job, result: Any, error: BaseException | None) -> None:
    if error is not None:
        _fail(job, error)
        return
    job.drop()
    job.report.completed(result)


def _fail(job: Job, error: BaseException) -> None:
    job.drop()
    job.report.failed(error)


def _stop(job: Job) -> None:
    if job.detached is not None:
        job.detached.cancel()


def settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """End a future; one that ended meanwhile, because nobody waits any more, stays as it is."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
