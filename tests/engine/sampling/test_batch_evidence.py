from __future__ import annotations

import logging

import pytest
import torch
from fixtures.small_models import make

from tg_tinker.engine.sampling.steps import batch_evidence
from tg_tinker.engine.sampling.steps.padded_cache import PaddedCache
from tg_tinker.engine.sampling.steps.step_decoder import StepDecoder

YES = ["gpt2", "gpt-neo", "gpt-neox", "gemma", "gemma2", "phi", "phi3", "olmo2", "opt", "bloom", "mistral"]
YES += ["mistral-windowed", "gpt-oss", "deepseek-v3"]
NO = {
    "phi3-longrope": "rows far from one another gave other logits",  # one row's length changes every row's angles
    "roberta": "rows padded in front gave other logits",  # its positions do not begin at 0
    "llama4": "layers of the kind chunked_attention",
    "lfm2": "its cache has layers of the kind LinearAttentionLayer",
    "mamba": "cache",  # it has none of keys and values; since transformers 5.24 it has one of its own
}


def spoilt(kit, monkeypatch, family, change):
    """A model whose forward pass is wrapped."""
    model = make(family)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **values: change(model, forward, values))
    return kit.wrap(model)


def deaf_to(name):
    """A forward pass that overlooks an argument."""
    return lambda model, forward, values: forward(**{key: value for key, value in values.items() if key != name})


def cache_of(values):
    """What was read before, under either name that transformers has had for it."""
    return values.get("cache", values.get("past_key_values"))


def without_windows(model, forward, values):
    """A forward pass that forgets the sliding window when the cache is not the model's own."""
    for part in (model.config, *(module for module in model.modules() if hasattr(module, "sliding_window"))):
        part.sliding_window = 4096 if isinstance(cache_of(values), PaddedCache) else 16
    return forward(**values)


def across_rows(model, forward, values):
    """A forward pass in which rows see one another."""
    output = forward(**values)
    output.logits = output.logits + 0.1 * output.logits.mean(0)
    return output


def wrong_when(condition):
    """A forward pass that is wrong for some inputs only."""

    def change(model, forward, values):
        wrong = condition(values, *values["input_ids"].shape)
        output = forward(**values)
        output.logits = output.logits.flip(-1) if wrong else output.logits
        return output

    return change


def begun(values):
    """Whether tokens were read before."""
    return cache_of(values) is not None and cache_of(values).get_seq_length() > 0


def far(values):
    """Whether more tokens were read before than the sliding window holds."""
    return begun(values) and cache_of(values).get_seq_length() > 16


def looking_ahead(model, forward, values):
    """A forward pass in which every token sees the last one."""
    last = model.get_input_embeddings()(values["input_ids"][:, -1:])
    output = forward(**values)
    output.logits = output.logits + model.get_output_embeddings()(last)
    return output


def one_at_a_time(model, forward, values):
    """A forward pass that does not know shared rows."""
    if len(values["input_ids"]) > 1:
        raise NotImplementedError("one at a time, please")
    return forward(**values)


@pytest.mark.parametrize("family", YES)
def test_models_that_allow_it_are_believed(kit, family):
    """Models with plain keys and values share passes, whatever their positions and windows are made of."""
    assert batch_evidence.objection(kit.wrap(make(family))) is None


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt-oss"])
def test_half_precision_is_believed(kit, family):
    """Rounding to bfloat16 is no objection."""
    assert batch_evidence.objection(kit.wrap(make(family).bfloat16())) is None


@pytest.mark.parametrize("family", list(NO))
def test_models_that_do_not_allow_it_are_found_out(kit, family):
    """A model with other state, or whose rows would change one another, is decoded one sequence at a time."""
    assert NO[family] in batch_evidence.objection(kit.wrap(make(family)))


@pytest.mark.parametrize(
    ("family", "change", "objection"),
    [
        ("gpt2", deaf_to("attention_mask"), "rows padded in front gave other logits"),
        ("gpt2", deaf_to("position_ids"), "rows padded in front gave other logits"),
        ("mistral-windowed", without_windows, "longer than the sliding window gave other logits"),
        ("gemma2", without_windows, "longer than the sliding window gave other logits"),
        (
            "mistral-windowed",
            wrong_when(lambda values, rows, tokens: rows == 1 and far(values) and "position_ids" in values),
            "longer than the sliding window gave other logits",
        ),
        (
            "mistral-windowed",
            wrong_when(lambda values, rows, tokens: tokens > 1 and far(values)),
            "in pieces beyond the sliding window gave other logits",
        ),
        ("phi", across_rows, "prompts in one pass gave other logits"),
        ("phi", looking_ahead, "prompts in one pass gave other logits"),
        (
            "phi",
            wrong_when(lambda values, rows, tokens: tokens > 1 and begun(values)),
            "in two pieces gave other logits",
        ),
        ("phi", wrong_when(lambda values, rows, tokens: tokens == 1 < rows), "rows padded in front gave other logits"),
        (
            "phi",
            wrong_when(lambda values, rows, tokens: rows > 1 and begun(values) and "attention_mask" not in values),
            "rows of one length gave other logits",
        ),
        ("phi", one_at_a_time, "raised NotImplementedError: one at a time, please"),
    ],
)
def test_spoilt_passes_are_found_out(kit, monkeypatch, family, change, objection):
    """What a shared pass needs of a model is tried, each thing by itself."""
    assert objection in batch_evidence.objection(spoilt(kit, monkeypatch, family, change))


def test_not_a_number_is_no_evidence(kit):
    """A model whose logits are not finite is not believed."""
    model = make("gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, torch.nan)
    assert "gave other logits" in batch_evidence.objection(kit.wrap(model))


def test_too_short_models_are_not_tried(kit):
    """A model that cannot read what is tried on it says so."""
    assert "too few" in batch_evidence.objection(kit.wrap(make("gpt2", n_positions=8)))


def test_the_log_says_why_it_is_slow(kit, caplog):
    """Who gets one sequence after another reads the reason in the log; who does not reads nothing."""
    with caplog.at_level(logging.INFO, logger="tg_tinker"):
        StepDecoder(kit.wrap(make("phi")))
        assert not caplog.records
        StepDecoder(kit.wrap(make("roberta")))
    assert "random is sampled one sequence after another: rows padded" in caplog.text
