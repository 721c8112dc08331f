"""Training on architectures that do things in their own way: dropout, bodies, sums in place."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from fixtures.small_models import LENGTH, make
from fixtures.training import drive, gradients, random_rows, stir, tiny

from tg_tinker.engine.lora import lora_linear
from tg_tinker.engine.lora.adapters import AdapterSpec, active
from tg_tinker.engine.models.base_model import BaseModel
from tg_tinker.engine.training.trainer import Trainer

SPEC = AdapterSpec(rank=2, alpha=4.0)


def base_of(family: str) -> BaseModel:
    """A small random model of the family, as loading it would leave it."""
    model = make(family).requires_grad_(False).eval()
    lora_linear.install(model)
    base: BaseModel = attrs.evolve(tiny(), name=family, model=model, vocab_size=262, max_length=LENGTH)
    return base


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt-oss"])
def test_checkpointing_turns_no_dropout_on(family: str) -> None:
    """A model whose layers drop out by themselves has, checkpointed, the gradient that it has otherwise."""
    base, found = base_of(family), []
    for checkpointing in (False, True):
        run = Trainer(base, SPEC, reduction="token_mean", seed=0, gradient_checkpointing=checkpointing)
        stir(run.adapter)
        drive(run.forward_backward(random_rows(40, 30)))
        found.append(gradients(run))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    assert not any(module.training for module in base.model.modules())


def test_a_model_that_hides_its_body_makes_its_logits_itself() -> None:
    """Where the body cannot be found, and layers add to what others gave, logprobs are those of the model's logits."""
    base = base_of("llama4")
    assert base.model.base_model is base.model
    run = Trainer(base, SPEC, reduction="token_mean", seed=0)
    stir(run.adapter)
    (row,) = random_rows(20)
    output = drive(run.forward_backward([row]))
    with active(base, run.adapter), torch.no_grad():
        logits = base.model(torch.from_numpy(row.tokens)[None]).logits[0]
    expected = logits.log_softmax(-1)[torch.arange(19), torch.from_numpy(row.targets[:19])]
    np.testing.assert_allclose(output.logprobs[0][:19], expected.numpy(), atol=1e-4)
