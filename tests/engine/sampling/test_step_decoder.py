from __future__ import annotations

import pytest
from fixtures.small_models import make
from transformers import T5Config, T5ForConditionalGeneration

from tg_tinker.engine.sampling.sampler import Sampler
from tg_tinker.engine.sampling.slots import routed_decoder
from tg_tinker.engine.sampling.steps.step_decoder import StepDecoder
from tg_tinker.errors import InvalidRequestError


def test_other_architectures_take_the_fallback(kit):
    """The sampler decodes what the slot decoder does not know step by step, and the rest not."""
    assert isinstance(Sampler(kit.base("gpt-neox"))._decoder, StepDecoder)
    assert isinstance(Sampler(kit.base("qwen2"))._decoder, routed_decoder.RoutedDecoder)


def test_requests_take_turns(kit):
    """A short request beside a long one ends first, and each hears of one token a tick."""
    sampler = Sampler(kit.base("gpt-neox"))
    long, short = kit.submit(
        sampler, kit.request(kit.prompt(5), max_tokens=30), kit.request(kit.prompt(8), max_tokens=4)
    )
    heard = []
    while not long.ended:
        sampler.step()
        heard.append((len(long.tokens), len(short.tokens)))
    assert heard[:5] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4)]
    assert (short.result.finish_reason, long.result.finish_reason) == ("length", "length")


def passes_of(base, monkeypatch):
    """The shapes of the passes from now on."""
    shapes = []
    forward = base.model.forward
    monkeypatch.setattr(
        base.model, "forward", lambda **values: shapes.append(tuple(values["input_ids"].shape)) or forward(**values)
    )
    return shapes


@pytest.mark.parametrize(("family", "rows"), [("gpt-neox", 3), ("roberta", 1)])
def test_equal_prompts_share_a_pass_and_go_apart(kit, monkeypatch, family, rows):
    """Requests with the same prompt read it once; what is kept of them is their own."""
    base = kit.base("gpt-neox") if family == "gpt-neox" else kit.wrap(make(family))
    sampler = Sampler(base)
    passes = passes_of(base, monkeypatch)
    prompt = kit.prompt(11)
    requests = [kit.request(prompt, seed=seed, max_tokens=6) for seed in range(3)]
    together = kit.run(sampler, *requests)
    assert passes == [(1, 11), *[(rows, 1)] * (15 // rows)]
    assert [own.tokens for own in together] == [kit.run(Sampler(base), request)[0].tokens for request in requests]
    assert len({own.tokens for own in together}) == 3


def test_each_adapter_has_one_pass_a_tick(kit, monkeypatch):
    """Prompts of an adapter that differ little in length are read in one pass, and decoded in one from then on."""
    base = kit.base("gpt-neox")
    sampler = Sampler(base)
    versions = [kit.adapter(base, 1), kit.adapter(base, 2), None]
    passes = passes_of(base, monkeypatch)
    kit.submit(
        sampler,
        *(kit.request(kit.prompt(9 - n // 3, n), adapter=versions[n % 3], seed=n, max_tokens=2 + n) for n in range(9)),
    )
    sampler.step()
    assert sorted(passes) == [(3, 9)] * 3
    passes.clear()
    kit.drain(sampler)
    assert passes[:9] == [(3, 1), (3, 1), (3, 1), (2, 1), (3, 1), (3, 1), (2, 1), (2, 1), (3, 1)]
    assert passes[-1] == (1, 1)


def test_a_long_prompt_is_not_padded_to(kit, monkeypatch):
    """Prompts of very different lengths are read in passes of their own, so that little is wasted."""
    base = kit.base("gpt-neox")
    sampler = Sampler(base)
    passes = passes_of(base, monkeypatch)
    kit.submit(sampler, *(kit.request(kit.prompt(length), max_tokens=1) for length in (200, 190, 20, 12, 11)))
    kit.drain(sampler)
    assert passes == [(2, 200), (3, 20)]


def test_passes_make_few_needless_logits(kit, monkeypatch):
    """Prompts that end in many places do not all share a pass: every row has logits in each of those places."""
    base = kit.base("gpt-neox")
    sampler = Sampler(base)
    passes = passes_of(base, monkeypatch)
    kit.submit(sampler, *(kit.request(kit.prompt(length), max_tokens=1) for length in range(1, 21)))
    kit.drain(sampler)
    assert passes == [(8, 20), (8, 12), (4, 4)]


def test_encoder_decoders_are_refused(kit):
    """A model that is not a causal language model is refused when the sampler is made."""
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    model.config.max_position_embeddings = 64
    with pytest.raises(InvalidRequestError, match="encoder-decoder") as raised:
        StepDecoder(kit.wrap(model))
    assert raised.value.field == "base_model"


def test_a_model_without_a_cache_is_refused(kit, monkeypatch):
    """A model that keeps no cache fails its requests with a reason, and nothing is made up."""
    base = kit.base("gpt-neox")
    forward = base.model.forward
    monkeypatch.setattr(base.model, "forward", lambda **values: forward(**{**values, "use_cache": False}))
    sampler = Sampler(base)
    (recorder,) = kit.submit(sampler, kit.request(kit.prompt(4)))
    kit.drain(sampler)
    assert isinstance(recorder.error, InvalidRequestError)
    assert "cache" in recorder.error.message
