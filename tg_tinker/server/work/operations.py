"""What the scheduler runs: operations of a run, as generators that give way between micro-batches.

An operation yields ``None`` after each micro-batch, or an ``Offline`` whose value it needs before it can go on. It
returns its result, or an ``Offline`` or ``Detached`` that will give it while the run goes on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import attrs

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@attrs.frozen
class Offline(Generic[R]):
    """Work for a thread that is not the device's: sealing, files, anything that only waits."""

    work: Callable[[], R]


#: told once how a detached operation ended, by its result or its error; from any thread
Done: TypeAlias = Callable[[Any, BaseException | None], None]


class Detached(ABC, Generic[R_co]):
    """Work that goes on outside the run's order, such as sampling. Both methods run on the device thread."""

    @abstractmethod
    def begin(self, done: Done) -> None:
        """Start; ``done`` is called once."""

    @abstractmethod
    def cancel(self) -> None:
        """Stop soon; ``done`` is then called with an error."""


Steps: TypeAlias = Generator[Offline[Any] | None, Any, R | Offline[R] | Detached[R]]
Begin: TypeAlias = Callable[[], Generator[Any, Any, Any]]


class Report(Protocol):
    """Hears how a job goes; called from the device thread and from worker threads."""

    def started(self) -> None:
        """It is at the head of its run and has begun."""
        ...

    def completed(self, result: Any) -> None:
        """It ended well."""
        ...

    def failed(self, error: BaseException) -> None:
        """It ended badly; ``FutureCancelledError`` where it was asked to stop."""
        ...


class SamplerLike(Protocol):
    """What the device thread knows of an engine's sampler."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        ...

    def step(self) -> None:
        """Make one token for every active request."""
        ...
