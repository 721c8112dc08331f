"""Saving a run and continuing it: the same bits, or a refusal that changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from fixtures.training import drive, gradients, random_rows, tiny, trainer

from tg_tinker.engine.lora.adapters import AdapterSpec
from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
from tg_tinker.engine.training.trainer import Trainer, TrainerState
from tg_tinker.errors import InvalidRequestError, ServerError

SPEC = AdapterSpec(rank=4, alpha=8.0, dropout=0.2)
WHOLE = attrs.evolve(SPEC, target_modules=("q_proj", "up_proj"), modules_to_save=("lm_head", "model.norm"))
ADAM = OptimizerSettings(learning_rate=1e-2, weight_decay=0.01, grad_clip_norm=1.0)


def train(run: Trainer, steps: range, between=lambda: None) -> list[float]:
    """Two passes and an optimizer step, several times, on rows that depend on the step alone."""
    losses = []
    for step in steps:
        for part in range(2):
            rows = random_rows(40, 12, 25, 33, seed=10 * step + part)
            losses.append(drive(run.forward_backward(rows), between).loss)
        run.optim_step(ADAM)
    return losses


def fresh(seed: int = 1, *, spec: AdapterSpec = SPEC, **settings) -> Trainer:
    """A run with dropout whose passes take several micro-batches."""
    return trainer(spec=spec, seed=seed, **({"micro_batch_tokens": 64} | settings))


def through_storage(state: TrainerState) -> TrainerState:
    """What a store gives back: the counters through JSON, the tensors as copies."""
    return TrainerState({name: t.clone() for name, t in state.tensors.items()}, json.loads(json.dumps(state.counters)))


def same_tensors(one: Trainer, two: Trainer) -> bool:
    """Whether adapters and moments are equal to the bit."""
    first, second = one.state(), two.state()
    assert first.counters == second.counters
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(value, second.tensors[name]) for name, value in first.tensors.items()
    )


@pytest.mark.parametrize(("spec", "checkpointing"), [(SPEC, False), (SPEC, True), (WHOLE, True)])
def test_a_restored_run_continues_bit_for_bit(spec, checkpointing) -> None:
    """Saved and restored half-way, dropout on, another run training in between: same losses, moments and tensors."""
    straight = fresh(spec=spec, gradient_checkpointing=checkpointing)
    expected = train(straight, range(4))

    before = fresh(spec=spec, gradient_checkpointing=checkpointing)
    found = train(before, range(2))
    state = through_storage(before.state())
    train(before, range(7, 8))  # what happens to the old run after saving does not matter

    after, neighbour = fresh(seed=99, spec=spec, gradient_checkpointing=checkpointing), fresh(seed=5)
    assert after.load(state, with_optimizer=True) == ()
    found += train(after, range(2, 4), lambda: train(neighbour, range(1)))
    assert found == expected
    assert same_tensors(straight, after)


def test_a_gradient_that_waits_for_its_step_is_saved_too() -> None:
    """A state taken between forward_backward and optim_step continues with that gradient."""
    straight, broken = fresh(), fresh(seed=3)
    drive(straight.forward_backward(random_rows(20, 30)))
    broken.load(through_storage(straight.state()), with_optimizer=True)
    assert broken.gradient_hash() == straight.gradient_hash()
    for run in (straight, broken):
        drive(run.forward_backward(random_rows(15)))
        run.optim_step(ADAM)
    assert same_tensors(straight, broken)


def test_loading_without_the_optimizer_takes_adapter_and_step() -> None:
    """Weights and step come along, moments and gathered gradient are dropped."""
    source, target = fresh(), fresh(seed=3)
    train(source, range(2))
    drive(target.forward_backward(random_rows(9)))
    target.load(through_storage(source.state()), with_optimizer=False)
    assert target.step == 2
    assert target.optimizer.steps == 0
    assert not gradients(target)
    assert target.seed == 3
    assert all(torch.equal(source.adapter.named()[name], tensor) for name, tensor in target.adapter.named().items())


def test_a_state_without_optimizer_is_the_adapter_alone() -> None:
    """Such a state holds the peft tensors only, and cannot restore an optimizer."""
    source, target = fresh(), fresh(seed=3)
    train(source, range(1))
    state = through_storage(source.state(include_optimizer=False))
    assert set(state.tensors) == set(source.adapter.named())
    target.load(state, with_optimizer=False)
    with pytest.raises(InvalidRequestError) as caught:
        target.load(state, with_optimizer=True)
    assert caught.value.field == "state.optimizer"


def test_a_state_is_a_copy() -> None:
    """Training on does not change a state that was taken before."""
    run = fresh()
    train(run, range(1))
    state = run.state()
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    train(run, range(1, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors.items())


def test_what_may_cost_exactness_is_named() -> None:
    """Another dtype of the base model, other micro-batches: the load works and says what differs."""
    source, target = fresh(), trainer(tiny("bfloat16"), spec=SPEC, micro_batch_tokens=128)
    reasons = target.load(through_storage(source.state()), with_optimizer=True)
    assert any(reason.startswith("dtype: float32 then, bfloat16 now") for reason in reasons)
    assert any(reason.startswith("micro_batch_tokens: 64 then, 128 now") for reason in reasons)


def _drop_moment(state: TrainerState) -> TrainerState:
    tensors = dict(state.tensors)
    del tensors[next(name for name in tensors if name.startswith("exp_avg_sq."))]
    return attrs.evolve(state, tensors=tensors)


def _poison_adapter(state: TrainerState) -> TrainerState:
    tensors = dict(state.tensors)
    name = next(name for name in tensors if name.startswith("base_model."))
    tensors[name] = tensors[name] * float("nan")
    return attrs.evolve(state, tensors=tensors)


def _halve_adapter(state: TrainerState) -> TrainerState:
    tensors = dict(state.tensors)
    name = next(name for name in tensors if name.startswith("base_model."))
    tensors[name] = tensors[name].half()
    return attrs.evolve(state, tensors=tensors)


def _add_gradient(state: TrainerState) -> TrainerState:
    name = next(name for name in state.tensors if name.startswith("base_model."))
    return attrs.evolve(state, tensors={**state.tensors, f"grad.{name}": state.tensors[name]})


def _other_format(state: TrainerState) -> TrainerState:
    return attrs.evolve(state, counters={**state.counters, "format": "something else"})


def _other_alpha(state: TrainerState) -> TrainerState:
    return attrs.evolve(state, counters={**state.counters, "spec": {**state.counters["spec"], "alpha": 1.0}})


@pytest.mark.parametrize(
    "spoil", [_drop_moment, _poison_adapter, _halve_adapter, _add_gradient, _other_format, _other_alpha]
)
def test_a_state_that_does_not_fit_changes_nothing(spoil) -> None:
    """Wrong tensors and wrong counters are refused as a whole, and the run goes on as it was."""
    source, target = fresh(), fresh(seed=3)
    train(source, range(1))
    train(target, range(1))
    before = target.state()
    with pytest.raises(InvalidRequestError):
        target.load(spoil(through_storage(source.state())), with_optimizer=True)
    after = target.state()
    assert after.counters == before.counters
    assert all(torch.equal(value, after.tensors[name]) for name, value in before.tensors.items())


def test_a_state_of_another_rank_is_refused() -> None:
    """An adapter of another rank does not fit."""
    other = trainer(spec=attrs.evolve(SPEC, rank=2, alpha=4.0))
    with pytest.raises(InvalidRequestError) as caught:
        other.load(fresh().state(), with_optimizer=False)
    assert caught.value.field == "state.spec.rank"


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("modules_to_save", attrs.evolve(WHOLE, modules_to_save=())),
        ("target_modules", attrs.evolve(WHOLE, target_modules=None)),
    ],
)
def test_a_state_of_other_modules_is_refused_by_name(field: str, changed: AdapterSpec) -> None:
    """Where the tensors differ because other modules are trained, the error names that field and both its values."""
    state = fresh(spec=WHOLE).state()
    with pytest.raises(InvalidRequestError, match="expected this run's") as caught:
        fresh(spec=changed).load(state, with_optimizer=True)
    assert caught.value.field == f"state.spec.{field}"


def test_a_state_that_finds_no_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever memory runs out while a state is loaded, the error is typed, and the run is as it was before."""
    small = attrs.evolve(SPEC, target_modules=("q_proj",))
    other, run, third = fresh(seed=3, spec=small), fresh(spec=small), fresh(spec=small)
    for one, steps in ((other, 2), (run, 1)):
        train(one, range(steps))
        drive(one.forward_backward(random_rows(20)))
    state, before = through_storage(other.state()), run.state()
    with monkeypatch.context() as patched:
        plenty = Memory(patched, pieces=10**6)
        third.load(state, with_optimizer=True)
    for pieces in range(plenty.taken):
        with monkeypatch.context() as patched:
            Memory(patched, pieces)
            with pytest.raises(ServerError, match="delete runs") as caught:
                run.load(state, with_optimizer=True)
        assert caught.value.code == "OUT_OF_MEMORY"
        after = run.state()
        assert after.counters == before.counters
        assert all(torch.equal(value, after.tensors[name]) for name, value in before.tensors.items())
    run.load(state, with_optimizer=True)
    assert same_tensors(run, other)


class Memory:
    """So many pieces of memory for the calls that take some; then it has run out."""

    def __init__(self, patched: pytest.MonkeyPatch, pieces: int) -> None:
        self.pieces, self.taken = pieces, 0
        for owner, name in ((torch.Tensor, "to"), (torch, "isfinite"), (torch, "tensor")):
            patched.setattr(owner, name, self._rationed(getattr(owner, name)))

    def _rationed(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def take(*arguments: Any, **options: Any) -> Any:
            if self.taken == self.pieces:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.taken += 1
            return allocate(*arguments, **options)

        return take
