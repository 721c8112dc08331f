"""A run's queue: jobs in the order of their acceptance, one after the other. Guarded by the scheduler's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Any, Literal

from tg_tinker.server.work.operations import Begin, Detached, Offline, Report

State = Literal["queued", "running", "detached", "ended"]


class Job:
    """One accepted operation on its way through the scheduler."""

    def __init__(self, name: str, begin: Begin, report: Report) -> None:
        self.name = name
        self.state: State = "queued"
        self.stopping = False
        self.report = report
        self.detached: Detached[Any] | None = None
        self._begin = begin
        self._steps: Generator[Any, Any, Any] | None = None
        self._sent: Any = None
        self._raised: BaseException | None = None

    def __repr__(self) -> str:
        """Name and state."""
        return f"<Job {self.name}: {self.state}>"

    def resume(self) -> Any:
        """Run up to the next yield; raises ``StopIteration`` with the operation's return value at its end."""
        if self._steps is None:
            self._steps = self._begin()
        raised, self._raised = self._raised, None
        sent, self._sent = self._sent, None
        return self._steps.send(sent) if raised is None else self._steps.throw(raised)

    def hand(self, value: Any, error: BaseException | None) -> None:
        """Keep what an ``Offline`` gave for the next ``resume``."""
        self._sent, self._raised = value, error

    def close(self) -> None:
        """Stop where it stands; its ``finally`` and ``except GeneratorExit`` clauses run."""
        if self._steps is not None:
            self._steps.close()

    def drop(self) -> None:
        """Let go of everything it held: batches are large and tickets are kept for an hour."""
        self._steps = self._sent = self._raised = self.detached = None
        self._begin = _nothing
        self.state = "ended"


class Lane:
    """The jobs of one run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.jobs: deque[Job] = deque()
        self.current: Job | None = None
        self.in_turn = False  # it stands in the scheduler's round
        self.waits_for: Offline[Any] | None = None  # what its current job yielded
        self.finishing: deque[tuple[Job, Offline[Any]]] = deque()  # left the lane, still being written; in order

    def __repr__(self) -> str:
        """Name, what runs, how many wait."""
        return f"<Lane {self.name}: {self.current or 'idle'}, {len(self.jobs)} queued>"

    @property
    def runnable(self) -> bool:
        """Whether the device thread can do something for it now."""
        return self.waits_for is None and (self.current is not None or bool(self.jobs))


def _nothing() -> Generator[Any, Any, Any]:
    yield from ()
