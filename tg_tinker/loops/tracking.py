"""What a run reports while it trains: one record per optimizer step, to any tracker.

A ``Tracker`` is two methods; W&B's is here, and imported only where it is asked for. A record is made when the step's
result arrives, whoever waited for it and how. Trackers work in a thread of their own and can never stop the training.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from time import monotonic
from typing import Any, Protocol, runtime_checkable

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import checks
from tg_tinker.types.loops_results import ForwardBackwardOutput, OptimStepResponse

__all__ = ["Progress", "Tracker", "WandbConfig", "WandbTracker", "tracker_of"]

_logger = logging.getLogger("tg_tinker.loops")
_SUMMED = frozenset({"loss", "loss:sum", "num_tokens", "skip_token_normalization"})
_OF_THE_STEP = ("learning_rate", "grad_norm", "epsilon")
_PATIENCE = 5.0  # seconds


@runtime_checkable
class Tracker(Protocol):
    """Where the records of a run go. Both methods are called in one thread, in order; they may block."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the record of an optimizer step."""

    def finish(self) -> None:
        """Nothing more will come."""


def _named(_: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise checks.refuse(attribute.name, "a non-empty string", value)


@attrs.frozen
class WandbConfig:
    """A run on Weights & Biases: its project, and its name there (None: W&B makes one up)."""

    project: str = attrs.field(validator=_named)
    name: str | None = attrs.field(default=None, validator=attrs.validators.optional(_named))


class WandbTracker:
    """Logs to a run on Weights & Biases.

    Raises ``InvalidRequestError`` where the ``[wandb]`` extra is not installed.
    """

    def __init__(self, config: WandbConfig) -> None:
        try:
            wandb = import_module("wandb")
        except ImportError as error:
            message = "wandb_config needs Weights & Biases: pip install 'tg-tinker[wandb]'"
            raise InvalidRequestError(message, field="wandb_config", code="EXTRA_MISSING") from error
        self._run: Any = wandb.init(project=config.project, name=config.name)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send a record; W&B buffers it."""
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        """End the run on W&B, once everything is sent."""
        self._run.finish()


def tracker_of(wandb_config: object, tracker: object) -> Tracker | None:
    """The tracker that a client was asked to use; W&B's is started here, which may block.

    Raises ``InvalidRequestError`` where both are given, or neither fits.
    """
    if wandb_config is None:
        if tracker is not None and not isinstance(tracker, Tracker):
            raise checks.refuse("tracker", "an object with log(metrics, step) and finish(), or None", tracker)
        return tracker
    if tracker is not None:
        raise checks.refuse("tracker", "nothing beside wandb_config", tracker)
    if not isinstance(wandb_config, WandbConfig):
        raise checks.refuse("wandb_config", "a WandbConfig, or None", wandb_config)
    return WandbTracker(wandb_config)


@attrs.define(eq=False)
class _Gathered:
    """The passes of one optimizer step, as far as they are known."""

    awaited: int = 0
    losses: float = 0.0
    tokens: float = 0.0
    summed: bool = False
    sums: defaultdict[str, float] = attrs.field(factory=lambda: defaultdict(float))
    response: OptimStepResponse | None = None

    def add(self, output: ForwardBackwardOutput) -> None:
        """Count a pass in, weighted by its tokens; a server that does not count them has passes of equal weight."""
        metrics = output.metrics
        tokens = metrics.get("num_tokens", 1.0)
        self.summed = self.summed or bool(metrics.get("skip_token_normalization"))
        self.losses += output.loss if self.summed else output.loss * tokens
        self.tokens += tokens
        for name in metrics.keys() - _SUMMED:
            self.sums[name] += metrics[name] * tokens

    def record(self, seconds: float) -> dict[str, float]:
        """What is told of the step: means over its tokens, and the tokens trained in ``seconds`` of wall time."""
        each = max(self.tokens, 1.0)
        found = {name: total / each for name, total in self.sums.items()}
        found |= {"loss": self.losses if self.summed else self.losses / each, "num_tokens": self.tokens}
        found["tokens_per_second"] = self.tokens / max(seconds, 1e-9)
        told = (self.response.metrics if self.response is not None else None) or {}
        return found | {name: told[name] for name in _OF_THE_STEP if name in told}


class Progress:
    """Joins a run's passes to the step that applies them, however their results arrive, and tells the tracker.

    ``expect_pass`` and ``expect_step`` are called when an operation is submitted, in any thread, and give what its
    result is to be handed to. A step succeeds only where its passes did, so a record waits for those and no others.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._thread = ThreadPoolExecutor(1, "tg-tinker-tracker")
        self._lock = threading.Condition()
        self._open = _Gathered()
        self._late: set[_Gathered] = set()  # their step is done, and a pass of theirs is still to be told
        self._since = monotonic()
        self._finished = False

    def expect_pass(self) -> Callable[[ForwardBackwardOutput], None]:
        """A pass was submitted; hand its result to what this gives."""
        with self._lock:
            self._open.awaited += 1
            return partial(self._passed, self._open)

    def expect_step(self) -> Callable[[OptimStepResponse], None]:
        """An optimizer step was submitted, over all passes since the last one."""
        with self._lock:
            gathered, self._open = self._open, _Gathered()
        return partial(self._stepped, gathered)

    def finish(self) -> None:
        """Tell the tracker what is still to be told, and that this was all; blocks until it is done.

        Passes whose step is done are done as well: their results are waited for, a few seconds at most.
        """
        with self._lock:
            self._lock.wait_for(lambda: not self._late, _PATIENCE)
            already, self._finished = self._finished, True
        if not already:
            self._thread.submit(self._tell, self._tracker.finish)
            self._thread.shutdown(wait=True)

    def _passed(self, gathered: _Gathered, output: ForwardBackwardOutput) -> None:
        with self._lock:
            gathered.awaited -= 1
            gathered.add(output)
            self._log_if_whole(gathered)
            self._lock.notify_all()

    def _stepped(self, gathered: _Gathered, response: OptimStepResponse) -> None:
        with self._lock:
            gathered.response = response
            self._late.add(gathered)
            self._log_if_whole(gathered)

    def _log_if_whole(self, gathered: _Gathered) -> None:
        response = gathered.response
        if gathered.awaited or response is None or self._finished:
            return
        self._late.discard(gathered)
        now = monotonic()
        record, self._since = gathered.record(now - self._since), now
        step = int((response.metrics or {}).get("step", 0))
        self._thread.submit(self._tell, partial(self._tracker.log, record, step))

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # a tracker is anybody's code, and the training is not to end with it
            _logger.warning("the tracker %r failed; training goes on", self._tracker, exc_info=True)
