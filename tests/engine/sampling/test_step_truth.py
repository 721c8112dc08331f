from __future__ import annotations

import pytest
import torch
from fixtures.small_models import make

from tg_tinker.engine.lora import adapters
from tg_tinker.engine.sampling.sampler import Sampler

SHARED = ["gpt2", "gpt-neo", "gpt-neox", "gemma", "gemma2", "phi", "phi3", "olmo2", "opt", "bloom", "mistral-windowed"]
SHARED += ["gpt-oss", "deepseek-v3"]
SINGLE = ["roberta", "phi3-longrope", "lfm2"]


def agree(own, expected, clear):
    """Whether tokens are the same before the first that rounding could change."""
    return list(own[:clear]) == expected[:clear]


@pytest.mark.parametrize("family", [*SHARED, *SINGLE])
def test_greedy_is_the_naive_loop_and_generate(kit, family):
    """Prompts of many lengths that are decoded together give the tokens of a loop without a cache, and of generate."""
    base = kit.wrap(make(family))
    sampler = Sampler(base)
    assert sampler._decoder.whole_prompts == (family in SINGLE)
    prompts = [kit.prompt(length) for length in (3, 30, 9, 17, 4)]
    together = kit.run(sampler, *(kit.request(prompt, temperature=0.0, max_tokens=25) for prompt in prompts))
    compared = 0
    for prompt, own in zip(prompts, together, strict=True):
        naive, clear = kit.greedy(base, None, prompt, 25)
        compared += clear
        assert agree(own.tokens, naive, clear)
        if family == "roberta":
            continue  # its generate counts positions from 0, its forward pass does not
        ids = torch.tensor([prompt])
        generated = base.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=25)
        assert agree(own.tokens, generated[0, len(prompt) :].tolist(), clear)
    assert compared > 70


@pytest.mark.parametrize("family", [name for name in SHARED if name != "gpt2"])  # which has no linear layers to adapt
def test_logprobs_are_those_of_the_forward_pass(kit, family):
    """Every token of requests that come and go, with three adapters and none, has the model's own logprob."""
    base = kit.wrap(make(family))
    versions = [*(kit.adapter(base, seed, rank=2 + seed) for seed in range(3)), None]
    requests = [
        kit.request(kit.prompt(2 + 7 * (n % 6), n), adapter=versions[n % 4], seed=n, max_tokens=3 + 5 * (n % 5))
        for n in range(14)
    ]
    sampler = Sampler(base, slots=9)  # the rest joins when others have left
    early = kit.submit(sampler, *requests[:5])
    for _ in range(4):
        sampler.step()
    late = kit.submit(sampler, *requests[5:])
    kit.drain(sampler)
    for request, own in zip(requests, (recorder.result for recorder in early + late), strict=True):
        logits = kit.logits(base, request.adapter, [*request.prompt, *own.tokens])[len(request.prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(own.tokens)), list(own.tokens)]
        assert len(own.tokens) == request.max_tokens
        torch.testing.assert_close(torch.tensor(own.logprobs), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["phi", "gemma2"])
def test_prompts_are_read_in_pieces_and_scored(kit, family):
    """A long prompt that is read piece by piece beside others has the logprobs of one pass, and so has what follows."""
    base = kit.wrap(make(family))
    adapter, prompt = kit.adapter(base), kit.prompt(300)
    sampler = Sampler(base)
    kit.submit(sampler, *(kit.request(kit.prompt(5, n), adapter=adapter, seed=n, max_tokens=30) for n in range(4)))
    sampler.step()
    ask = kit.request(prompt, adapter=adapter, prompt_logprobs=True, max_tokens=20)
    (own,) = kit.run(sampler, ask)
    expected = kit.logits(base, adapter, [*prompt, *own.tokens]).log_softmax(-1)[:-1]
    chosen = expected[torch.arange(319), [*prompt[1:], *own.tokens]]
    torch.testing.assert_close(torch.tensor([*own.prompt_logprobs[1:], *own.logprobs]), chosen, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "mistral-windowed"])
def test_seeds_give_the_same_tokens_alone_and_together(kit, family):
    """A request gives the same tokens alone, among others, and when it arrives in the middle."""
    base = kit.wrap(make(family))
    request = kit.request(kit.prompt(20), seed=2**64 - 1, max_tokens=40, top_p=0.9)
    (alone,) = kit.run(Sampler(base), request)
    others = [kit.request(kit.prompt(3 + 9 * n), seed=n, max_tokens=10 + 20 * (n % 3)) for n in range(6)]
    together = kit.run(Sampler(base), *others[:3], request, *others[3:])[3]
    sampler = Sampler(base)
    kit.submit(sampler, *others)
    for _ in range(9):
        sampler.step()
    (late,) = kit.run(sampler, request)
    assert alone.tokens == together.tokens == late.tokens
    assert alone.logprobs == pytest.approx(together.logprobs, abs=2e-4)


@pytest.mark.parametrize("family", ["phi", "gemma2"])
def test_a_known_prefix_is_not_read_again(kit, monkeypatch, family):
    """A prompt that goes on from an earlier one and its answer is read from there on, and has the same logprobs."""
    base = kit.wrap(make(family))
    adapter = kit.adapter(base)
    sampler = Sampler(base)
    (first,) = kit.run(sampler, kit.request(kit.prompt(40), adapter=adapter, max_tokens=20))
    read = []
    forward = base.model.forward
    monkeypatch.setattr(
        base.model, "forward", lambda **values: read.append(values["input_ids"].numel()) or forward(**values)
    )
    prompt = (*kit.prompt(40), *first.tokens, 7, 8)
    (own,) = kit.run(sampler, kit.request(prompt, adapter=adapter, max_tokens=5))
    assert read == [3, 1, 1, 1, 1]  # the last of its tokens was never read, and two are new
    monkeypatch.undo()
    expected = kit.logits(base, adapter, [*prompt, *own.tokens])[len(prompt) - 1 : -1].log_softmax(-1)
    chosen = expected[torch.arange(5), list(own.tokens)]
    torch.testing.assert_close(torch.tensor(own.logprobs), chosen, rtol=0, atol=2e-4)


def test_states_of_more_than_one_shape(kit, caplog):
    """A model whose keys are larger than its values keeps no prefixes, and reads equal beginnings again."""
    base = kit.wrap(make("deepseek-v3"))
    sampler = Sampler(base)
    prompt = kit.prompt(40)
    kit.run(sampler, kit.request(prompt))
    assert sampler._prefixes.size == 0
    assert not caplog.records
    (own,) = kit.run(sampler, kit.request((*prompt, 5), temperature=0.0, max_tokens=5))
    naive, clear = kit.greedy(base, None, (*prompt, 5), 5)
    assert agree(own.tokens, naive, clear)


def test_an_adapter_is_active_only_in_its_own_passes(kit):
    """What an adapter changes stays with its sequences when they share ticks with the base model's."""
    base = kit.wrap(make("gemma"))
    adapter, prompt = kit.adapter(base), kit.prompt(9)
    with adapters.active(base, adapter):
        changed = base.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()
    requests = [kit.request(prompt, adapter=version, temperature=0.0) for version in (adapter, None, adapter, None)]
    own = [generation.tokens for generation in kit.run(Sampler(base), *requests)]
    assert own[0] == own[2] != own[1] == own[3]
    assert own[0][0] == int(changed)
