from __future__ import annotations

import pytest
import torch
from fixtures.small_models import make

from tg_tinker.engine.lora import adapters
from tg_tinker.engine.sampling.sampler import Sampler
from tg_tinker.engine.sampling.slots import fused_weights

FAMILIES = ["llama", "llama-biased", "llama-scaled", "qwen2", "qwen3", "gpt-neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_naive_loop_and_generate(kit, family):
    """Greedy decoding gives the tokens of a loop without a cache, and those of HF generate."""
    base = kit.base(family)
    prompt = kit.prompt(21)
    naive, clear = kit.greedy(base, None, prompt, 80)
    assert clear > 40
    (own,) = kit.run(Sampler(base), kit.request(prompt, temperature=0.0, max_tokens=80))
    assert list(own.tokens[:clear]) == naive[:clear]
    ids = torch.tensor([prompt])
    generated = base.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80, pad_token_id=0
    )
    assert generated[0, 21:].tolist()[:clear] == naive[:clear]


@pytest.mark.parametrize(
    ("family", "targets", "saved"),
    [
        ("qwen3", None, ()),
        ("qwen3", ("q_proj", "up_proj"), ("lm_head", "embed_tokens", "model.norm")),
        ("qwen3", ("o_proj",), ("q_proj", "q_norm", "layers.1.mlp", "input_layernorm")),
        ("llama-biased", ("down_proj",), ("k_proj", "lm_head")),
        ("gpt-neox", None, ()),
        ("gpt-neox", ("dense",), ("lm_head", "embed_in", "final_layer_norm")),
    ],
)
def test_greedy_with_an_adapter(kit, family, targets, saved):
    """An adapter decodes as the model does with it active, whole modules included, and differs from the base model."""
    base = kit.base(family)
    adapter, prompt = kit.adapter(base, targets=targets, saved=saved), kit.prompt(9)
    naive, clear = kit.greedy(base, adapter, prompt, 40)
    (own,) = kit.run(Sampler(base), kit.request(prompt, adapter=adapter, temperature=0.0, max_tokens=40))
    assert list(own.tokens[:clear]) == naive[:clear]
    assert clear > 20
    assert naive != kit.greedy(base, None, prompt, 40)[0]


def test_the_tiny_model_with_an_adapter(kit, tiny_base):
    """The built-in model with an adapter generates what HF generate does with that adapter active."""
    adapter, prompt = kit.adapter(tiny_base), kit.prompt(30)
    naive, clear = kit.greedy(tiny_base, adapter, prompt, 60)
    (own,) = kit.run(Sampler(tiny_base), kit.request(prompt, adapter=adapter, temperature=0.0, max_tokens=60))
    clear = min(clear, len(own.tokens))
    assert list(own.tokens[:clear]) == naive[:clear]
    ids = torch.tensor([prompt])
    with adapters.active(tiny_base, adapter):
        generated = tiny_base.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60
        )
    assert generated[0, 30:].tolist()[:clear] == naive[:clear]


def test_mistral_is_llama_unless_it_has_a_window(kit):
    """A Mistral without a sliding window is decoded as a Llama is, one with a window by transformers' passes."""
    base = kit.wrap(make("mistral"))
    prompt = kit.prompt(21)
    for adapter in (None, kit.adapter(base)):
        naive, clear = kit.greedy(base, adapter, prompt, 60)
        (own,) = kit.run(Sampler(base), kit.request(prompt, adapter=adapter, temperature=0.0, max_tokens=60))
        assert clear > 40
        assert list(own.tokens[:clear]) == naive[:clear]
    assert fused_weights.unsupported(base.model) is None
    assert "sliding" in fused_weights.unsupported(make("mistral-windowed"))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt-neox"])
def test_logprobs_are_those_of_the_forward_pass(kit, family, temperature):
    """Logprobs equal the model's own for five adapters, two with their own head, and the base model in one batch."""
    base = kit.base(family)
    versions = [kit.adapter(base, seed, rank=2 + seed, saved=("lm_head",) if seed > 2 else ()) for seed in range(5)]
    versions += [None, None]
    requests = [
        kit.request(kit.prompt(5 + 13 * n), adapter=adapter, temperature=temperature, seed=n, max_tokens=40)
        for n, adapter in enumerate(versions)
    ]
    for request, own in zip(requests, kit.run(Sampler(base), *requests), strict=True):
        logits = kit.logits(base, request.adapter, [*request.prompt, *own.tokens])
        after = logits[len(request.prompt) - 1 : -1] / (temperature or 1.0)
        expected = after.log_softmax(-1)[torch.arange(len(own.tokens)), list(own.tokens)]
        torch.testing.assert_close(torch.tensor(own.logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gpt-neox"])
def test_prompt_logprobs_are_those_of_the_forward_pass(kit, family):
    """Prompt logprobs equal the model's own at temperature 1, the first is None, and the top k are its top k."""
    base = kit.base(family)
    adapter, prompt = kit.adapter(base), kit.prompt(300)
    ask = kit.request(
        prompt, adapter=adapter, temperature=0.3, prompt_logprobs=True, topk_prompt_logprobs=3, max_tokens=0
    )
    (own,) = kit.run(Sampler(base), ask)
    expected = kit.logits(base, adapter, prompt).log_softmax(-1)[:-1]
    assert own.tokens == ()
    assert own.prompt_logprobs[0] is None
    assert own.topk_prompt_logprobs[0] is None
    chosen = expected[torch.arange(299), list(prompt[1:])]
    torch.testing.assert_close(torch.tensor(own.prompt_logprobs[1:]), chosen, rtol=0, atol=1e-4)
    values, ids = expected.topk(3)
    assert [[token for token, _ in top] for top in own.topk_prompt_logprobs[1:]] == ids.tolist()
    own_values = torch.tensor([[value for _, value in top] for top in own.topk_prompt_logprobs[1:]])
    torch.testing.assert_close(own_values, values, rtol=0, atol=1e-4)


def test_seeds_give_the_same_tokens_alone_and_together(kit):
    """A request gives the same tokens alone, among others, and when it arrives in the middle."""
    base = kit.base("qwen3")
    adapter = kit.adapter(base)
    request = kit.request(kit.prompt(20), adapter=adapter, seed=2**64 - 1, max_tokens=40, top_p=0.9)
    (alone,) = kit.run(Sampler(base), request)
    others = [kit.request(kit.prompt(3 + n), seed=n, max_tokens=50, adapter=kit.adapter(base, n)) for n in range(6)]
    together = kit.run(Sampler(base), *others[:3], request, *others[3:])[3]
    sampler = Sampler(base)
    kit.submit(sampler, *others)
    for _ in range(9):
        sampler.step()
    (late,) = kit.run(sampler, request)
    assert alone.tokens == together.tokens == late.tokens
    assert alone.logprobs == pytest.approx(together.logprobs, abs=1e-4)
    different = kit.run(Sampler(base), kit.request(kit.prompt(20), adapter=adapter, seed=5, max_tokens=40))[0]
    assert different.tokens != alone.tokens


def test_what_is_sampled_follows_the_distribution(kit):
    """The share of each first token over 4,000 seeds is its probability, within five standard errors."""
    base = kit.base("llama", vocab_size=20)
    prompt, count = (1, 2, 3), 4000
    requests = [kit.request(prompt, max_tokens=1, temperature=1.5, seed=seed) for seed in range(count)]
    drawn = torch.tensor([own.tokens[0] for own in kit.run(Sampler(base, slots=1000), *requests)])
    expected = (kit.logits(base, None, prompt)[-1] / 1.5).softmax(-1)
    share = torch.bincount(drawn, minlength=20) / count
    assert bool(((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all())
