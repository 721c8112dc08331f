"""One run's training: passes that gather gradients, optimizer steps, and the whole state in and out.

Operations are generators that yield between micro-batches, so that sampling and other runs get their turn; which
micro-batches there are depends on the request alone. Not here: the order of operations, privacy, storage.
"""

from __future__ import annotations

import hashlib
import math
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import attrs
import numpy as np

from tg_tinker.engine import memory
from tg_tinker.engine.lora import adapters
from tg_tinker.engine.lora.lora_linear import RowSeeds, mix
from tg_tinker.engine.training import forward, run_state
from tg_tinker.engine.training.batching import plan
from tg_tinker.engine.training.checkpointing import checkpointed, require_support
from tg_tinker.engine.training.collation import collate, scatter
from tg_tinker.engine.training.gradients import GradientSum
from tg_tinker.engine.training.inspection import inspect, loss_settings
from tg_tinker.engine.training.optim import Optimizer
from tg_tinker.engine.training.run_state import TrainerState
from tg_tinker.engine.training.schedules import learning_rate_at
from tg_tinker.errors import InvalidRequestError, OperationFailedError, TGTinkerError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tg_tinker.engine.lora.adapters import AdapterSpec, FrozenAdapter
    from tg_tinker.engine.models.base_model import BaseModel
    from tg_tinker.engine.training.batching import Row
    from tg_tinker.engine.training.collation import MicroBatch
    from tg_tinker.engine.training.forward import Outcome
    from tg_tinker.engine.training.gradients import ExampleGradients
    from tg_tinker.engine.training.losses import Config, Loss
    from tg_tinker.engine.training.optimizer_settings import OptimizerSettings

__all__ = ["PassOutput", "Reduction", "StepOutput", "Steps", "Trainer", "TrainerState"]

R = TypeVar("R")
Steps: TypeAlias = Generator[None, None, R]
Reduction = Literal["token_mean", "label_mean", "sum"]

_REDUCTIONS = ("token_mean", "label_mean", "sum")
_TOKENS_AT_ONCE = 8192
_WORK_ON_CPU = 1 << 35  # tokens x parameters of a micro-batch: a second or two on two cores
_LEAST_TOKENS = 128
_FREE_MEMORY = "delete runs that are done with, or free memory on this machine"


@attrs.frozen(eq=False)
class PassOutput:
    """What a forward pass found, gradients or not."""

    loss: float  # reduced as the run reports it
    loss_sum: float
    num_tokens: int  # active ones; pairs for losses over pairs
    logprobs: list[NDArray[np.float32]]  # per row, shaped like its targets; 0.0 where there is no target
    metrics: dict[str, float]


@attrs.frozen
class StepOutput:
    """What an optimizer step did."""

    step: int  # steps taken, this one included
    grad_norm: float  # of the reduced gradient, before clipping
    learning_rate: float


class Trainer:
    """The adapter of one run on a shared base model, with its gradient, its optimizer and its counters.

    ``reduction`` says what a step's gradient is: the mean over the active tokens gathered since the last step
    (``token_mean``; ``label_mean`` is TG's name for it) or their sum. ``micro_batch_tokens`` bounds a micro-batch,
    padding included; by default it follows from the model's size. ``per_example`` takes over each one's gradients.
    With ``dropout_by_row`` what a row drops follows from seed, step and its own tokens, whatever else is in the batch.
    """

    def __init__(
        self,
        base: BaseModel,
        spec: AdapterSpec,
        *,
        reduction: Reduction,
        seed: int,
        gradient_checkpointing: bool = False,
        max_length: int | None = None,
        max_grad_norm: float | None = None,
        micro_batch_tokens: int | None = None,
    ) -> None:
        if reduction not in _REDUCTIONS:
            message = f"reduction must be one of {', '.join(_REDUCTIONS)}, not {reduction!r}"
            raise InvalidRequestError(message, field="reduction", constraint=" | ".join(_REDUCTIONS))
        if gradient_checkpointing:
            require_support(base)
        self.base = base
        self.reduction = reduction
        self.seed = seed
        self.gradient_checkpointing = gradient_checkpointing
        self.max_length = min(max_length or base.max_length, base.max_length)
        self.max_grad_norm = max_grad_norm
        self.micro_batch_tokens = micro_batch_tokens or _tokens_at_once(base)
        with memory.guard("making the run", "train fewer modules whole, or a smaller rank"):
            self.adapter = adapters.create(base, spec)
        self.step = 0
        self.dropout_counter = 0  # micro-batches that drew dropout so far
        self.gradients = GradientSum(self.adapter.parameter_dict())
        self.optimizer = Optimizer(self.adapter.parameter_dict())
        self.per_example: Callable[[MicroBatch], ExampleGradients] | None = None
        self.dropout_by_row = False

    def __repr__(self) -> str:
        """Base model, adapter and step."""
        return f"<Trainer on {self.base.name}, {self.adapter!r}, step {self.step}>"

    def forward_backward(
        self, rows: Sequence[Row], loss_fn: str = "cross_entropy", config: Mapping[str, float | bool] | None = None
    ) -> Steps[PassOutput]:
        """Add the gradient of the summed loss to what is gathered; a failure or a cancellation drops all of that.

        Raises ``InvalidRequestError`` for rows or settings that cannot be used, ``OperationFailedError`` for a loss
        that is not finite, ``ServerError`` when memory runs out.
        """
        try:
            loss, complete = self._admit(rows, loss_fn, config)
            self.gradients.join(normalised=self._normalises(complete))
            output = yield from self._passes(rows, loss, complete, gradients=True)
            self.gradients.add(output.num_tokens)
        # Not only errors: a generator that is closed half-way (GeneratorExit) leaves half a gradient behind.
        except BaseException:
            self.discard_gradients()
            raise
        return output

    def forward(
        self, rows: Sequence[Row], loss_fn: str = "cross_entropy", config: Mapping[str, float | bool] | None = None
    ) -> Steps[PassOutput]:
        """Compute loss and logprobs without dropout and without touching the gradient; raises as the pass above."""
        loss, complete = self._admit(rows, loss_fn, config)
        return (yield from self._passes(rows, loss, complete, gradients=False))

    def check_step(self, optimizer: OptimizerSettings) -> None:
        """Refuse settings that the next step cannot be taken with; raises ``InvalidRequestError``."""
        learning_rate_at(optimizer, self.step)

    def optim_step(self, optimizer: OptimizerSettings) -> StepOutput:
        """Reduce and clip the gathered gradient, update the adapter, and start gathering anew.

        Raises ``InvalidRequestError`` when nothing was gathered, ``OperationFailedError`` when the gradient is not
        finite (it is then dropped, and the adapter is as before).
        """
        learning_rate = learning_rate_at(optimizer, self.step)
        clip = self.max_grad_norm if optimizer.grad_clip_norm is None else optimizer.grad_clip_norm
        try:
            norm = self.gradients.reduce(clip)
        except OperationFailedError:
            self.discard_gradients()
            raise
        self.optimizer.step(optimizer, learning_rate)
        self.discard_gradients()
        self.step += 1
        return StepOutput(self.step, norm, learning_rate)

    def discard_gradients(self) -> None:
        """Forget what was gathered since the last step."""
        self.gradients.clear()

    def gradient_hash(self) -> str:
        """Digest the gathered gradient, ``sha256:<hex>``."""
        return self.gradients.digest()

    def snapshot(self) -> FrozenAdapter:
        """Copy the adapter as it is now, for sampling."""
        with memory.guard("copying the adapter", _FREE_MEMORY):
            return self.adapter.snapshot()

    def state(self, *, include_optimizer: bool = True) -> TrainerState:
        """Copy everything that continuing exactly needs; without the optimizer, the adapter and the step alone."""
        with memory.guard("copying the state", _FREE_MEMORY):
            return run_state.save(self, include_optimizer=include_optimizer)

    def load(self, state: TrainerState, *, with_optimizer: bool) -> tuple[str, ...]:
        """Continue from ``state``; without its optimizer, take adapter and step and start from no moments.

        The answer names what may keep the continuation from being exact to the bit: nothing, on the same machine.
        Raises ``InvalidRequestError`` when the state does not fit, ``ServerError`` when memory runs out; then nothing
        has changed.
        """
        with memory.guard("loading the state", _FREE_MEMORY):
            return run_state.load(self, state, with_optimizer=with_optimizer)

    def _admit(
        self, rows: Sequence[Row], loss_fn: str, config: Mapping[str, float | bool] | None
    ) -> tuple[Loss, dict[str, float | bool]]:
        loss, complete = loss_settings(loss_fn, config)
        inspect(rows, loss, vocab_size=self.base.vocab_size, max_length=self.max_length)
        return loss, complete

    def _normalises(self, config: Config) -> bool:
        return self.reduction != "sum" and not config.get("skip_token_normalization", False)

    def _passes(self, rows: Sequence[Row], loss: Loss, config: Config, *, gradients: bool) -> Steps[PassOutput]:
        """Run every micro-batch and add up what they give."""
        sums: dict[str, float] = {}
        logprobs: list[NDArray[np.float32]] = [np.zeros(row.targets.shape, np.float32) for row in rows]
        loss_sum, active = 0.0, 0
        for number, indices in enumerate(plan(rows, max_tokens=self.micro_batch_tokens, group=loss.rows_per_unit)):
            if number:
                yield
            chosen = [rows[index] for index in indices]
            batch = collate(chosen, loss, device=self.base.device, dtype=self.adapter.dtype)
            seed = self._dropout_seed(chosen) if gradients else None
            outcome = self._micro_batch(batch, loss, config, gradients=gradients, seed=seed)
            loss_sum += outcome.loss_sum
            active += batch.active if loss.rows_per_unit == 1 else len(chosen) // loss.rows_per_unit
            for name, value in outcome.metric_sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for index, values in zip(indices, scatter(chosen, outcome.logprobs.numpy()), strict=True):
                logprobs[index] = values
        if self.per_example is None or not gradients:  # otherwise what is not finite is left out, example by example
            _check_finite(loss_sum, "forward_backward" if gradients else "forward")
        divisor = max(1, active) if self._normalises(config) else 1
        metrics = {"loss:sum": loss_sum, "num_tokens": float(active)}
        metrics |= {name: value / max(1, active) for name, value in sums.items()}
        if self.per_example is not None:
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if config.get("skip_token_normalization"):
            metrics["skip_token_normalization"] = 1.0
        return PassOutput(loss_sum / divisor, loss_sum, active, logprobs, metrics)

    def _micro_batch(
        self, batch: MicroBatch, loss: Loss, config: Config, *, gradients: bool, seed: int | RowSeeds | None
    ) -> Outcome:
        recorder = self.per_example(batch) if gradients and self.per_example is not None else None
        with ExitStack() as stack:
            stack.enter_context(_typed_failures("forward_backward" if gradients else "forward"))
            stack.enter_context(adapters.active(self.base, self.adapter, dropout_seed=seed, recorder=recorder))
            if gradients and self.gradient_checkpointing:
                stack.enter_context(checkpointed(self.base))
            left_out = recorder is not None
            outcome = forward.run(self.base, batch, loss, config, gradients=gradients, finite_only=left_out)
            if recorder is not None:
                recorder.finish(self.adapter)
            return outcome

    def _dropout_seed(self, rows: Sequence[Row]) -> int | RowSeeds | None:
        if not self.adapter.spec.dropout:
            return None
        if self.dropout_by_row:
            seeds = tuple(_row_seed(row, mix(self.seed, self.step)) for row in rows)
            return RowSeeds(seeds, tuple(len(row.tokens) for row in rows))
        self.dropout_counter += 1
        return mix(self.seed, self.dropout_counter)


def _row_seed(row: Row, seed: int) -> int:
    digest = hashlib.blake2b(row.tokens.tobytes(), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _tokens_at_once(base: BaseModel) -> int:
    """Bound a micro-batch by its work where computing is slow, so that sampling never waits long behind one."""
    if base.device.type != "cpu":
        return _TOKENS_AT_ONCE
    return min(_TOKENS_AT_ONCE, max(_LEAST_TOKENS, _WORK_ON_CPU // max(1, base.model.num_parameters())))


def _check_finite(loss: float, operation: str) -> None:
    if not math.isfinite(loss):
        message = f"the loss is not finite ({loss}): the adapter has diverged, or an input is too large for its dtype"
        raise OperationFailedError(message, operation=operation)


@contextmanager
def _typed_failures(operation: str) -> Generator[None]:
    """Turn whatever the device raises into an error of this package."""
    advice = "send fewer or shorter rows at once, or turn gradient_checkpointing on"
    try:
        with memory.guard(operation, advice):
            yield
    except TGTinkerError:
        raise
    # Kernels, drivers and model code raise classes of their own; the run stays usable after any of them.
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed pass
        message = f"{operation} failed on the device: {type(error).__name__}: {error}"
        raise OperationFailedError(message, operation=operation) from error
