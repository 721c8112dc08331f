"""What one example can do to a step: add its own clipped gradient, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.private_runs import Private, finish, gradient, make_rows, make_trainer

from tg_tinker.engine.lora.adapters import AdapterSpec
from tg_tinker.engine.models.base_model import BaseModel
from tg_tinker.engine.training.batching import Row
from tg_tinker.engine.training.trainer import Trainer
from tg_tinker.errors import InvalidRequestError, OperationFailedError


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_example_changes_the_sum_by_the_bound_at_most(base: BaseModel, tmp_path: Path, dropout: float) -> None:
    """Without any one example the sum lacks its clipped gradient and no more, whatever dropout does."""
    rows, bound, sums = make_rows(), 0.05, []
    for number, kept in enumerate([rows, *(rows[:gone] + rows[gone + 1 :] for gone in range(len(rows)))]):
        private = Private(make_trainer(base, dropout=dropout), tmp_path, f"run-{number}", max_grad_norm=bound)
        private.forward_backward(kept)
        sums.append(gradient(private.trainer))
    assert all(float((other - sums[0]).norm()) <= bound * (1 + 1e-9) for other in sums[1:])


def test_dropout_differs_from_step_to_step(base: BaseModel, tmp_path: Path) -> None:
    """The same rows at another step drop something else: the gathered sums differ though the weights do not."""
    private, sums = Private(make_trainer(base, dropout=0.3), tmp_path), []
    for private.trainer.step in (0, 1):
        private.forward_backward(make_rows())
        sums.append(gradient(private.trainer))
        private.run.discard_gradients()
    assert not torch.allclose(sums[0], sums[1], rtol=1e-3)


@pytest.mark.parametrize(("name", "value"), [("weights", 1e308), ("temperatures", 1e-320)])
def test_an_example_that_is_not_finite_is_left_out(base: BaseModel, tmp_path: Path, name: str, value: float) -> None:
    """Its gradient adds nothing, what is told of loss and metrics is finite, and without gradients it is an error."""
    rows, bad = make_rows(), make_rows(7, (8,))[0]
    bad = Row(bad.tokens, bad.targets, {name: np.full(8, value)})
    sums, losses = [], []
    for number, batch in enumerate((rows, [*rows[:3], bad, *rows[3:]])):
        private = Private(make_trainer(base), tmp_path, f"run-{number}")
        output = private.forward_backward(batch)
        sums.append(gradient(private.trainer))
        losses.append(output.loss_sum)
        assert all(np.isfinite(value) for value in (output.loss, *output.metrics.values()))
    assert torch.allclose(sums[0], sums[1], rtol=0, atol=1e-12)
    assert losses[0] == pytest.approx(losses[1])
    with pytest.raises(OperationFailedError, match="not finite"):
        finish(private.trainer.forward([bad]))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapted_output_head_is_refused(base: BaseModel, tmp_path: Path, dropout: float) -> None:
    """It sees the labelled positions of all rows at once: refused by name, and nothing stays of the pass."""
    spec = AdapterSpec(rank=2, alpha=4.0, dropout=dropout, target_modules=("lm_head",))
    private = Private(Trainer(base, spec, reduction="label_mean", seed=0), tmp_path)
    with pytest.raises(InvalidRequestError, match="lm_head sees"):
        private.forward_backward(make_rows())
    assert not private.privacy.state()["examples"]
