"""Modules trained whole beside an adapter: what may be one, masters above a coarse base, and steps against peft."""

from __future__ import annotations

import attrs
import pytest
import torch
from fixtures.peft_oracle import peft_model
from fixtures.training import drive, gradients, random_rows, tiny, trainer
from torch.nn import functional

from tg_tinker.engine.lora import adapters
from tg_tinker.engine.lora.adapters import AdapterSpec
from tg_tinker.engine.training import forward
from tg_tinker.engine.training.optimizer_settings import OptimizerSettings
from tg_tinker.errors import InvalidRequestError

SPEC = AdapterSpec(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"), modules_to_save=("lm_head", "model.norm"))


def test_a_fresh_copy_changes_nothing() -> None:
    """Before the first step a run with whole modules computes what the base model does."""
    tokens = torch.arange(20)[None]
    adapter = adapters.create(tiny(), SPEC)
    with adapters.active(tiny(), adapter):
        own = tiny().model(tokens).logits
    assert torch.equal(own, tiny().model(tokens).logits)
    assert set(adapter.saved) == {"lm_head.weight", "model.norm.weight"}


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (("head",), "match no module with weights; there are: .*lm_head.*norm"),
        (("lm_head", "act_fn"), r"\['act_fn'\] match no module"),
        (("q_proj",), "would train model.layers.0.self_attn.q_proj whole, and target_modules adapts it"),
        (("layers.1",), "would train model.layers.1.self_attn.q_proj whole"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(saved: tuple[str, ...], said: str) -> None:
    """A name without weights, or with an adapted layer in it, is refused by name, with the names that there are."""
    with pytest.raises(InvalidRequestError, match=said) as caught:
        adapters.create(tiny(), attrs.evolve(SPEC, modules_to_save=saved))
    assert caught.value.field == "modules_to_save"


def test_steps_are_those_of_peft() -> None:
    """Three AdamW steps on the same rows leave our tensors and those of peft's model, under the same names, equal."""
    run = trainer(spec=SPEC)
    oracle = peft_model(run.adapter)
    trained = [parameter for parameter in oracle.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        (row,) = random_rows(40, seed=step)
        drive(run.forward_backward([row]))
        run.optim_step(OptimizerSettings(learning_rate=1e-2, weight_decay=0.1))
        logits = oracle(torch.from_numpy(row.tokens)[None]).logits[0]
        functional.cross_entropy(logits, torch.from_numpy(row.targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = {name: value for name, value in oracle.named_parameters() if value.requires_grad}
    plain = {name.replace(".modules_to_save", "").replace(".default", ""): value for name, value in theirs.items()}
    assert plain.keys() == run.adapter.named().keys()
    for name, value in run.adapter.named().items():
        torch.testing.assert_close(value, plain[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "dpo"])
def test_the_head_may_be_passed_in_pieces(monkeypatch: pytest.MonkeyPatch, loss_fn: str) -> None:
    """With a head of the run's own, the gradients do not depend on how many positions go through it at once."""
    inputs = ("weights", "ref_logprobs") if loss_fn == "dpo" else ()
    rows = random_rows(40, 12, inputs=inputs)
    found = []
    for at_once in (1 << 24, 7 * tiny().vocab_size):
        monkeypatch.setattr(forward, "_LOGITS_AT_ONCE", at_once)
        run = trainer(spec=SPEC)
        drive(run.forward_backward(rows, loss_fn))
        found.append(gradients(run))
    assert found[0]["grad.base_model.model.lm_head.weight"].any()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=1e-4)


def test_masters_are_finer_than_the_base_model() -> None:
    """On a bf16 base, with checkpointing, whole modules are trained in fp32, and steps too small for bf16 add up."""
    run = trainer(tiny("bfloat16"), spec=SPEC, gradient_checkpointing=True)
    weight = run.adapter.saved["lm_head.weight"]
    before = weight.detach().clone()
    for step in range(3):
        drive(run.forward_backward(random_rows(40, 30, seed=step)))
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        run.optim_step(OptimizerSettings(learning_rate=1e-6))
    moved = (weight.detach() - before).abs()
    assert 0 < float(moved.max()) < 1e-5
    assert run.snapshot().saved["lm_head.weight"].dtype == torch.bfloat16
