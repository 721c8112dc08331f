"""Training state to sealed artifacts and back. The copying is done in the run's order, files in other threads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.server.engine import Engine
from tg_tinker.server.training.runs import Run
from tg_tinker.server.work.operations import Offline

if TYPE_CHECKING:
    from tg_tinker.store.checkpoints import ArtifactRecord, CheckpointStore, Loaded

KEY = "server"  # where, among an artifact's counters, the server keeps what it must know to load it


@attrs.frozen
class Restored:
    """A state that was loaded; ``reasons`` say why training may not resume bit for bit."""

    record: ArtifactRecord
    step: int
    reasons: tuple[str, ...]


def save(
    run: Run,
    store: CheckpointStore,
    *,
    kind: str,
    metadata: Mapping[str, Any],
    include_optimizer: bool = True,
    name: str | None = None,
    expires_at: datetime | None = None,
) -> Offline[ArtifactRecord]:
    """Copy the state now, on the device thread; the work that is left seals it and ends when it is durable."""
    state = run.trainer.state(include_optimizer=include_optimizer)
    counters = {**state.counters, KEY: {**origin(run), "optimizer": include_optimizer}}
    step, privacy = run.step, privacy_of(run)

    def write() -> ArtifactRecord:
        return store.save(
            tenant=run.tenant,
            run_id=run.id,
            kind=kind,
            step=step,
            tensors=state.tensors,
            counters=counters,
            metadata=metadata,
            name=name,
            expires_at=expires_at,
            privacy=privacy,
        )

    return Offline(write)


def load(
    run: Run, engine: Engine, find: Callable[[], Loaded], *, with_optimizer: bool
) -> Generator[Offline[Any], Any, Restored]:
    """Verify an artifact completely, then put it in the place of the run's state."""
    loaded: Loaded = yield Offline(find)
    made: Mapping[str, Any] = loaded.counters.get(KEY, {})
    check_origin(run, loaded.record, made)
    counters = {key: value for key, value in loaded.counters.items() if key != KEY}
    complete = with_optimizer and bool(made["optimizer"])
    privacy = yield Offline(partial(run.behind, made["privacy"], loaded.record.run_id))
    yield from run.account(privacy)
    going_on = run.restore_privacy(privacy, with_step=complete)
    try:
        reasons = run.trainer.load(engine.state(loaded.tensors, counters), with_optimizer=complete)
    except BaseException:  # whatever it was: the releases are united by now, and the step in progress is forgotten
        if run.privacy is not None:  # it no longer knows which examples the gathered gradient holds
            run.discard_gradients()
        raise
    if not going_on:
        run.trainer.discard_gradients()
    run.start_afresh()
    return Restored(loaded.record, run.step, (*reasons, *_reasons(run, made, with_optimizer=with_optimizer)))


def origin(run: Run) -> dict[str, Any]:
    """What an adapter was trained on, for it fits nothing else, and how."""
    base = run.model.base
    return {
        "base_model": run.model.ref,
        "base_digest": base.digest,
        "optimizer_config": run.config.get("optimizer"),
        "max_steps": run.max_steps,
        "noise": None if run.privacy is None else run.privacy.noise,
        "privacy": run.privacy_state(),
    }


def privacy_of(run: Run) -> dict[str, Any] | None:
    """What an artifact's manifest says of the privacy of what is in it."""
    if run.privacy is None:
        return None
    report = run.privacy_report().to_dict()
    names = ("unit", "total_epsilon", "epsilon_is_infinite", "delta", "accountant", "steps")
    return {name: report[name] for name in names}


def check_origin(run: Run, record: ArtifactRecord, made: Mapping[str, Any]) -> None:
    """Refuse what is no training state, or is one of another base model."""
    if record.kind == "sampler_weights":
        message = "this is a published adapter: it serves sampling, and training cannot resume from it"
        raise InvalidRequestError(f"path: {message}", field="path", constraint="a saved training state")
    if made.get("base_digest") != run.model.base.digest:
        other, own = made.get("base_model"), run.model.ref
        here = f"this run trains {own}" if own != other else "whose weights are others here"
        message = f"artifact_id: it was trained on {other}, {here}"
        raise InvalidRequestError(message, field="artifact_id", constraint=f"a state of {run.model.ref}")


def _reasons(run: Run, made: Mapping[str, Any], *, with_optimizer: bool) -> tuple[str, ...]:
    reasons: list[str] = []
    if not with_optimizer:
        reasons.append("the optimizer's state was not asked for")
    elif not made["optimizer"]:
        reasons.append("it was saved without the optimizer's state")
    if made["optimizer_config"] != run.config.get("optimizer"):
        reasons.append("the run's optimizer is configured differently")
    elif _decays(run) and made.get("max_steps") != run.max_steps:
        reasons.append(f"the learning rate falls over {run.max_steps} steps here, over {made.get('max_steps')} there")
    return (*reasons, *_noise_reasons(made.get("noise"), None if run.privacy is None else run.privacy.noise))


def _decays(run: Run) -> bool:
    """Whether the learning rate depends on when the run is to end; on the Loops surface it comes with each step."""
    schedule: str = run.config.get("optimizer", {}).get("lr_scheduler", "constant")
    return schedule != "constant"


def _noise_reasons(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Iterator[str]:
    if then == now:
        return
    if then is None or now is None:
        yield "one of the two runs has differential privacy, the other has not"
    elif {**then, "lineage": now["lineage"]} != now:
        yield "differential privacy is configured differently"
    else:
        yield "another run draws noise of its own"
