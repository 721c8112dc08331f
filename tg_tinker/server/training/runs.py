"""Training runs: what each one is, who may train it, and what a failed pass does to the step behind it.

The operations themselves are in ``tg_operations`` and ``loops_operations``; they run on the device thread, and so do
the methods here that touch the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tg_tinker.errors import InvalidRequestError, OperationFailedError, TGTinkerError
from tg_tinker.server.records.tickets import Ticket
from tg_tinker.server.training.passes import Passes
from tg_tinker.server.training.private import PrivateTraining
from tg_tinker.server.weights.models import Model
from tg_tinker.server.weights.versions import Versions
from tg_tinker.server.work.lanes import Lane
from tg_tinker.server.work.operations import Offline
from tg_tinker.types.results import DPMetrics, PrivacyReport
from tg_tinker.wire.tg import RUN_COMPLETED, RUN_FAILED

if TYPE_CHECKING:
    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
    from tg_tinker.engine.training.trainer import PassOutput, StepOutput, Trainer

Surface = Literal["tg", "loops"]

NO_PRIVACY = PrivacyReport(
    enabled=False,
    accountant="none",
    total_epsilon=None,
    epsilon_is_infinite=True,
    target_epsilon=None,
    remaining_epsilon=None,
    delta=0.0,
    noise_multiplier=0.0,
    max_grad_norm=0.0,
    sample_rate=1.0,
    expected_batch_size=0,
    steps=0,
)


class Run:
    """One adapter in training on a shared base model."""

    def __init__(
        self,
        *,
        run_id: str,
        tenant: str,
        surface: Surface,
        model: Model,
        trainer: Trainer,
        config: dict[str, Any],
        versions: Versions,
        max_steps: int | None = None,
        privacy: PrivateTraining | None = None,
    ) -> None:
        self.id = run_id
        self.tenant = tenant
        self.surface = surface
        self.model = model
        self.config = config
        self.privacy = privacy
        self._frozen: FrozenAdapter | None = None  # of the weights as they are now
        self.use(trainer)
        self.max_steps = max_steps
        self.created_at = datetime.now(UTC)
        self.lane = Lane(run_id)
        self.versions = versions
        self.published = 0  # the last version number given out; device thread
        self.named: dict[tuple[str, str], tuple[str, int]] = {}  # (kind, name) -> artifact id, version; whole values
        self.broken: str | None = None
        self._carried: dict[str, dict[str, Any]] = {}  # releases behind weights that a run without DP started from
        self.passes = Passes()

    def __repr__(self) -> str:
        """Id, step, status."""
        return f"<Run {self.id}: step {self.step}, {self.status}>"

    @property
    def step(self) -> int:
        """Optimizer steps applied."""
        return self.trainer.step

    @property
    def status(self) -> str:
        """One of "active", "completed" (``max_steps`` reached) or "failed" (a step broke in the middle)."""
        if self.broken is not None:
            return "failed"
        return "completed" if self.max_steps is not None and self.step >= self.max_steps else "active"

    def check_trainable(self) -> None:
        """Refuse training where it is over: ``InvalidRequestError`` with code RUN_COMPLETED or RUN_FAILED."""
        if self.broken is not None:
            message = f"run {self.id} failed in an optimizer step ({self.broken}): load a saved state to go on"
            raise InvalidRequestError(message, field="status", constraint="an active run", code=RUN_FAILED)
        if self.status == "completed":
            message = f"run {self.id} has taken its {self.max_steps} steps (max_steps); sampling and saving go on"
            raise InvalidRequestError(message, field="max_steps", constraint="an active run", code=RUN_COMPLETED)

    def use(self, trainer: Trainer) -> None:
        """Train with this trainer from now on."""
        self.trainer = trainer
        self._frozen = None
        if self.privacy is not None:
            self.privacy.attach(trainer)
            self.privacy.discard()

    def snapshot(self) -> FrozenAdapter:
        """The weights as they are now; asked again before they change, it is the same copy."""
        if self._frozen is None:
            self._frozen = self.trainer.snapshot()
        return self._frozen

    def train(
        self, ticket: Ticket, read: Callable[[], Sequence[Any]], loss_fn: str = "cross_entropy", config: Any = None
    ) -> Generator[Offline[None] | None, Any, PassOutput]:
        """A pass over the rows that ``read`` gives; if it fails or is stopped, all that was accumulated is dropped."""
        self.passes.begun(ticket)
        self.check_trainable()
        try:
            yield from self.account()
            rows = read()
            if self.privacy is not None:
                self.privacy.admit(rows, loss_fn, config, step=self.step + 1)
        # Whatever it is: nothing was added, and the step behind this pass must not be taken without it.
        except BaseException as error:
            self.passes.failed(ticket, error)
            raise
        try:
            return (yield from self.trainer.forward_backward(rows, loss_fn, config))
        # Not only errors: one that is cancelled half-way (GeneratorExit) leaves half a gradient behind.
        except BaseException as error:
            self.discard_gradients()
            self.passes.failed(ticket, error)
            raise

    def account(self, loading: Mapping[str, Any] | None = None) -> Generator[Offline[None], Any, None]:
        """Have what the run has spent, and the next step's cost, computed on another thread where that takes long.

        ``loading`` is the privacy state of a checkpoint that is about to be loaded.
        """
        if self.privacy is not None and self.privacy.policy.accounts_slowly:
            yield Offline(partial(self.privacy.policy.account, () if loading is None else loading["ledger"]))

    def discard_gradients(self) -> None:
        """Forget what was gathered since the last step."""
        self.trainer.discard_gradients()
        if self.privacy is not None:
            self.privacy.discard()

    def check_gradients(self, ticket: Ticket) -> None:
        """Refuse a step that was accepted before its client could know that a pass before it had failed.

        Raises ``DPBudgetExceededError`` where it could not be taken either, ``OperationFailedError`` otherwise.
        """
        spoiler = self.passes.spoiler(ticket)
        if spoiler is not None:
            self.discard_gradients()
            if self.privacy is not None:
                self.privacy.policy.check_step(self.step + 1)
            raise OperationFailedError(f"{ticket.operation} was not taken: {spoiler}", operation=ticket.operation)

    def step_with(self, optimizer: OptimizerSettings, *, noise: bool = True) -> tuple[StepOutput, DPMetrics | None]:
        """Apply the accumulated gradients; a step that breaks in the middle leaves the run "failed"."""
        self.trainer.check_step(optimizer)  # before the release: what was charged and noised must be applied
        metrics = None if self.privacy is None else self.privacy.release(self.trainer, noise=noise)
        self._frozen = None
        try:
            output = self.trainer.optim_step(optimizer)
        except TGTinkerError:
            raise
        # Whatever else it is, weights and moments may no longer belong together.
        except BaseException as error:  # noqa: BLE001
            self.broken = f"{type(error).__name__}: {error}"
            self._note_open_step()
            message = f"optim_step broke in the middle ({self.broken}); load a saved state to go on"
            raise OperationFailedError(message, operation="optim_step", code=RUN_FAILED) from None
        self._note_open_step()
        return output, metrics

    def _note_open_step(self) -> None:
        """A step without privacy, on weights that rest on private ones, is a release without noise: ε has no bound."""
        if self.privacy is None and self._carried:
            name, no_noise = f"{self.id}/open", {"noise_multiplier": 0.0, "max_grad_norm": 0.0, "sample_rate": 1.0}
            self._carried[name] = {"release_id": name, "lineage": self.id, "step": self.step, **no_noise}

    def gradient_hash(self) -> str:
        """Digest the gathered gradient; keyed under differential privacy."""
        return self.trainer.gradient_hash() if self.privacy is None else self.privacy.gradient_hash(self.trainer)

    def privacy_state(self) -> dict[str, Any]:
        """The noisy releases that these weights rest on, and the private step in progress, for a checkpoint."""
        return {"ledger": list(self._carried.values())} if self.privacy is None else self.privacy.state()

    def behind(self, state: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
        """The privacy state of a checkpoint of run ``origin``, with what was released after it was saved."""
        return state if self.privacy is None else self.privacy.policy.behind(state, origin)

    def restore_privacy(self, state: Mapping[str, Any], *, with_step: bool) -> bool:
        """Take the releases behind a checkpoint's weights in: what was released stays released.

        Says whether the gradients gathered in the checkpoint may be gone on with.
        """
        if self.privacy is not None:
            return self.privacy.restore(state, with_step=with_step)
        self._carried |= {release["release_id"]: dict(release) for release in state["ledger"]}
        return with_step

    def privacy_report(self) -> PrivacyReport:
        """What the run has spent; without differential privacy there is no bound on what it reveals."""
        return NO_PRIVACY if self.privacy is None else self.privacy.report()

    def start_afresh(self) -> None:
        """The weights were replaced: failures before that no longer matter."""
        self._frozen = None
        self.passes.forget()
        self.broken = None


class Runs:
    """Every live run of this process, by tenant."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], Run] = {}

    def __iter__(self) -> Iterator[Run]:
        """All of them."""
        return iter(list(self._runs.values()))

    def add(self, run: Run) -> None:
        """Make a run known."""
        self._runs[run.tenant, run.id] = run

    def find(self, tenant: str, run_id: str, surface: Surface | None = None) -> Run | None:
        """A tenant's run, of one surface or of either."""
        run = self._runs.get((tenant, run_id))
        return run if run is not None and surface in {None, run.surface} else None

    def of_tenant(self, tenant: str, surface: Surface | None = None) -> list[Run]:
        """A tenant's runs, newest first."""
        return [r for r in reversed(self._runs.values()) if r.tenant == tenant and surface in {None, r.surface}]

    def remove(self, run: Run) -> None:
        """Forget a run."""
        self._runs.pop((run.tenant, run.id), None)
