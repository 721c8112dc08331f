from __future__ import annotations

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from tg_tinker.engine.sampling import routed_decoder, step_decoder
from tg_tinker.engine.sampling.sampler import Sampler
from tg_tinker.engine.sampling.step_decoder import StepDecoder
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


def test_equal_prompts_share_a_pass_and_go_apart(kit, monkeypatch):
    """Requests with the same prompt read it once; their caches are their own."""
    base = kit.base("gpt-neox")
    passes = []
    forward = StepDecoder._forward
    monkeypatch.setattr(
        StepDecoder, "_forward", lambda self, tokens, *rest: passes.append(len(tokens)) or forward(self, tokens, *rest)
    )
    prompt = kit.prompt(11)
    requests = [kit.request(prompt, seed=seed, max_tokens=6) for seed in range(3)]
    together = kit.run(Sampler(base), *requests)
    assert passes.count(11) == 1
    assert [own.tokens for own in together] == [kit.run(Sampler(base), request)[0].tokens for request in requests]
    assert len({own.tokens for own in together}) == 3


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
    assert step_decoder.__name__.endswith("step_decoder")
