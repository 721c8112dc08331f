"""Bad requests and failures on the way: typed errors, no half gradients, and a run that stays usable."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import attrs
import numpy as np
import pytest
import torch
from fixtures.training import drive, gradients, random_rows, tiny, trainer

from tg_tinker.engine.lora import saved_modules
from tg_tinker.engine.lora.adapters import AdapterSpec
from tg_tinker.engine.training import forward
from tg_tinker.engine.training.batching import Row, rows_from_batch, rows_from_data
from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
from tg_tinker.engine.training.trainer import Trainer
from tg_tinker.errors import InvalidRequestError, OperationFailedError, ServerError
from tg_tinker.types.batch import BatchData
from tg_tinker.types.loops import Datum, ModelInput

ADAM = OptimizerSettings(learning_rate=1e-2)


def no_memory(*_: object, **__: object) -> None:
    """What torch does where memory has run out."""
    raise torch.OutOfMemoryError("CUDA out of memory")


def refused(rows: list[Row], loss_fn: str = "cross_entropy", **settings) -> InvalidRequestError:
    """The error that rows meet, on a run that had gathered something and trains on afterwards."""
    run = trainer(**settings)
    drive(run.forward_backward(random_rows(10)))
    with pytest.raises(InvalidRequestError) as caught:
        drive(run.forward_backward(rows, loss_fn))
    assert not gradients(run)
    drive(run.forward_backward(random_rows(10)))
    run.optim_step(ADAM)
    return caught.value


@pytest.mark.parametrize("token", [264, 70_000])
def test_a_token_out_of_the_vocabulary_is_named(token: int) -> None:
    """Both surfaces are told which row and position holds a token id that the model does not have."""
    error = refused(rows_from_data([Datum(ModelInput.from_ints([1])), Datum(ModelInput.from_ints([1, token]))]))
    assert error.problems[0] == f"expected a token id from 0 to 263, got {token} @ $.data[1].model_input[1]"
    error = refused(rows_from_batch(BatchData([[1, token]], labels=[[1, 1]])))
    assert error.problems == [f"expected a token id from 0 to 263, got {token} @ $.batch.input_ids[0][1]"]
    assert (error.field, error.constraint) == ("batch.input_ids[0][1]", "a token id from 0 to 263")


def test_a_target_out_of_the_vocabulary_is_named() -> None:
    """Targets are held to the same range, -100 apart."""
    error = refused(rows_from_batch(BatchData([[1, 2, 3]], labels=[[-100, 2, 999]])))
    assert error.problems == ["expected a token id from 0 to 263, or -100, got 999 @ $.batch.labels[0][2]"]


def test_a_place_is_one_of_the_batch_as_it_was_sent() -> None:
    """Padding in front counts, and a label is found where it was put, not where it is predicted."""
    ids, mask = [[0, 0, 5, 6, 7], [1, 2, 3, 4, 999]], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    error = refused(rows_from_batch(BatchData(ids, mask, [[-100, -100, 5, 6, 998], [-100] * 5])))
    assert [problem.partition("got ")[2] for problem in error.problems] == [
        "998 @ $.batch.labels[0][4]",
        "999 @ $.batch.input_ids[1][4]",
    ]


@pytest.mark.parametrize(("length", "limit"), [(2049, None), (33, 32)])
def test_a_row_too_long_for_the_model_is_refused(length: int, limit: int | None) -> None:
    """Neither the model's length nor the run's own limit may be passed."""
    error = refused(rows_from_data([Datum(ModelInput.from_ints(np.ones(length, int)))]), max_length=limit)
    assert error.problems == [f"expected 1 to {limit or 2048} tokens, got {length} @ $.data[0].model_input"]


def test_all_problems_are_listed() -> None:
    """The message has the first problem and how many more there are; the list has them."""
    error = refused([Row(np.array([500, 1]), np.array([1, -100])) for _ in range(30)])
    assert len(error.problems) == 20
    assert "and 29 more" in error.message


@pytest.mark.parametrize(
    ("rows", "loss_fn"),
    [
        ([], "cross_entropy"),
        (random_rows(5, 6, 7, inputs=("weights", "ref_logprobs")), "dpo"),
        (random_rows(5), "ppo"),
        (random_rows(5), "no_such_loss"),
        ([*random_rows(5), Row(np.ones(5, int), np.ones((5, 2), int))], "cross_entropy"),
        ([Row(np.ones(5, int), np.ones((5, 2), int), {"logprobs": np.ones(5), "advantages": np.ones(5)})], "ppo"),
        ([Row(np.ones(5, int), np.ones(4, int))], "cross_entropy"),
        ([Row(np.ones(5, int), np.ones(5, int), {"weights": np.ones(4)})], "cross_entropy"),
        ([Row(np.ones(5, int), np.full(5, -7))], "cross_entropy"),
    ],
)
def test_requests_that_make_no_sense_are_refused(rows: list[Row], loss_fn: str) -> None:
    """Empty, odd, incomplete, mixed and misshapen requests are typed errors."""
    assert refused(rows, loss_fn).field


def test_a_step_without_a_gradient_is_refused() -> None:
    """optim_step needs a forward_backward since the last step; a refused step counts as none."""
    run = trainer()
    with pytest.raises(InvalidRequestError, match="call forward_backward first"):
        run.optim_step(ADAM)
    drive(run.forward_backward(random_rows(5)))
    run.optim_step(ADAM)
    with pytest.raises(InvalidRequestError):
        run.optim_step(ADAM)
    assert run.step == 1


def test_a_wrong_schedule_leaves_the_gradient_alone() -> None:
    """Settings that cannot be used are refused before anything moves, and the gathered gradient can still be used."""
    run = trainer()
    drive(run.forward_backward(random_rows(5)))
    before = run.gradient_hash()
    with pytest.raises(InvalidRequestError):
        run.optim_step(OptimizerSettings(schedule="cosine"))
    assert run.gradient_hash() == before
    assert run.optim_step(ADAM).step == 1


def test_a_gradient_that_is_not_finite_never_reaches_the_adapter() -> None:
    """The step is refused, the gradient dropped, the adapter as before, and the run goes on."""
    run = trainer()
    before = [parameter.detach().clone() for parameter in run.adapter.parameters()]
    drive(run.forward_backward(random_rows(5)))
    run.adapter.parameters()[3].grad[0, 0] = float("nan")
    with pytest.raises(OperationFailedError) as caught:
        run.optim_step(ADAM)
    assert caught.value.operation == "optim_step"
    assert all(torch.equal(one, two) for one, two in zip(before, run.adapter.parameters(), strict=True))
    drive(run.forward_backward(random_rows(5)))
    assert run.optim_step(ADAM).step == 1


@pytest.mark.parametrize("operation", ["forward_backward", "forward"])
def test_a_loss_that_is_not_finite_is_an_error(operation: str) -> None:
    """A run that diverged says so in its next pass, which adds nothing; with sound weights it goes on."""
    run = trainer(micro_batch_tokens=16)
    before = run.state()
    with torch.no_grad():
        run.adapter.parameters()[3].fill_(float("inf"))
    with pytest.raises(OperationFailedError, match="the loss is not finite") as caught:
        drive(getattr(run, operation)(random_rows(10, 10)))
    assert caught.value.operation == operation
    assert not gradients(run)
    run.load(before, with_optimizer=True)
    drive(run.forward_backward(random_rows(5)))
    assert run.optim_step(ADAM).step == 1


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ServerError, "send fewer or shorter rows"),
        (torch.OutOfMemoryError("CUDA out of memory"), ServerError, "gradient_checkpointing"),
        (RuntimeError("a kernel broke"), OperationFailedError, "a kernel broke"),
        (IndexError("out of range"), OperationFailedError, "IndexError: out of range"),
    ],
)
def test_a_failure_in_the_second_micro_batch_drops_the_first(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], text: str
) -> None:
    """Whatever the device raises becomes a typed error, nothing of the pass is kept, and the run can go on."""
    run = trainer(micro_batch_tokens=16)
    plain, calls = forward.hidden_states, []

    def failing(*given) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 2:
            raise error
        return plain(*given)

    drive(run.forward_backward(random_rows(8)))
    run.discard_gradients()
    monkeypatch.setattr(forward, "hidden_states", failing)
    with pytest.raises(expected, match=text) as caught:
        drive(run.forward_backward(random_rows(10, 10)))
    assert caught.value.__cause__ is error
    assert not gradients(run)
    drive(run.forward_backward(random_rows(10, 10)))
    assert run.optim_step(ADAM).step == 1


def test_a_kept_error_keeps_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds on to the error of a failed pass does not hold on to its memory."""
    made: list[weakref.ref[torch.Tensor]] = []

    def failing(*_: object) -> torch.Tensor:
        large = torch.zeros(1000)
        made.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "hidden_states", failing)
    with pytest.raises(ServerError) as caught:
        drive(trainer().forward_backward(random_rows(5)))
    assert caught.value.__cause__ is not None
    assert made[0]() is None


def test_a_pass_that_is_cancelled_leaves_nothing() -> None:
    """Closing the generator between micro-batches drops the half gradient, and the adapter is not left bound."""
    run = trainer(micro_batch_tokens=16)
    operation = run.forward_backward(random_rows(10, 10, 10))
    next(operation)
    operation.close()
    assert not gradients(run)
    with pytest.raises(InvalidRequestError):
        run.optim_step(ADAM)
    tokens = torch.arange(8)[None]
    assert torch.equal(tiny().model(tokens).logits, tiny().model(tokens).logits)


def test_a_run_that_finds_no_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules trained whole may be large: where there is no room for them, the error is typed and says what to do."""
    monkeypatch.setattr(saved_modules, "copies", no_memory)
    with pytest.raises(ServerError, match="fewer modules") as caught:
        Trainer(tiny(), AdapterSpec(rank=2, alpha=2.0, modules_to_save=("lm_head",)), reduction="sum", seed=0)
    assert caught.value.code == "OUT_OF_MEMORY"


@pytest.mark.parametrize("copy", [Trainer.snapshot, Trainer.state])
def test_a_copy_that_finds_no_memory_says_so(
    monkeypatch: pytest.MonkeyPatch, copy: Callable[[Trainer], object]
) -> None:
    """Publishing and saving copy the adapter: where there is no room the error is typed, and the run goes on."""
    run = trainer()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", no_memory)
        with pytest.raises(ServerError, match="delete runs") as caught:
            copy(run)
    assert caught.value.code == "OUT_OF_MEMORY"
    assert copy(run) is not None


def test_a_trainer_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown reduction, and checkpointing where the model has none, are refused at once."""
    spec = AdapterSpec(rank=2, alpha=2.0)
    with pytest.raises(InvalidRequestError) as caught:
        Trainer(tiny(), spec, reduction="median", seed=0)
    assert caught.value.field == "reduction"
    monkeypatch.setattr(type(tiny().model), "supports_gradient_checkpointing", False)
    with pytest.raises(InvalidRequestError) as caught:
        Trainer(tiny(), spec, reduction="sum", seed=0, gradient_checkpointing=True)
    assert caught.value.field == "gradient_checkpointing"


def test_vocabulary_and_length_are_the_models_own() -> None:
    """A trainer's limits come from its base model."""
    small = attrs.evolve(tiny(), max_length=16)
    assert trainer(small, max_length=100).max_length == 16
