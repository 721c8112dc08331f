from __future__ import annotations

import gc
import weakref

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker.engine.sampling.prefix_cache import PrefixCache
from tg_tinker.engine.sampling.sampler import Sampler
from tg_tinker.engine.sampling.slots.slot_decoder import SlotDecoder

PER_TOKEN = 8  # bytes of a state of one layer, one head of size one, keys and values, in single precision


def state_of(tokens):
    """A state that shows which tokens it stands for."""
    return torch.tensor([float(token) for token in tokens]).expand(1, 2, 1, -1)[..., None].contiguous()


def put(cache, tokens, adapter=None, key=None):
    """Keep a state for the tokens."""
    cache.put(tuple(tokens), state_of(tokens), adapter, key)


def found(cache, tokens, adapter=None, key=None):
    """The tokens that a found state stands for."""
    state = cache.find(tuple(tokens), adapter, key)
    return None if state is None else [int(value) for value in state[0, 0, 0, :, 0]]


class Version:
    """Stands for an adapter: only its identity counts."""


def test_the_longest_common_start_is_found():
    """A prompt gets what it has in common with an entry, to the token, but never all of itself."""
    cache = PrefixCache(10**6)
    put(cache, range(40))
    assert found(cache, [*range(40), 7, 8]) == list(range(40))
    assert found(cache, [*range(21), 99]) == list(range(21))
    assert found(cache, range(40)) == list(range(39))
    assert found(cache, range(16)) == list(range(15))
    assert found(cache, range(10)) is None
    assert found(cache, [5, *range(1, 40)]) is None


def test_short_texts_and_no_budget_keep_nothing():
    """Less than a block is not worth keeping, and a budget of 0 turns it off."""
    cache, off = PrefixCache(10**6), PrefixCache(0)
    put(cache, range(15))
    put(off, range(50))
    assert (cache.size, off.size, off.enabled) == (0, 0, False)


def test_adapters_and_keys_are_apart():
    """Equal tokens of another adapter, of the base model or of another key are not found."""
    cache = PrefixCache(10**6)
    one, two = Version(), Version()
    put(cache, range(30), one, "a")
    assert found(cache, range(40), one, "a")
    assert not any(
        found(cache, range(40), *place) for place in ((one, "b"), (one, None), (two, "a"), (None, "a"), (None, None))
    )


def test_what_belongs_to_an_adapter_goes_with_it():
    """The entries of an adapter are freed at once when it is gone, those of others stay."""
    cache = PrefixCache(10**6)
    gone, kept = Version(), Version()
    put(cache, range(30), gone)
    put(cache, range(30), kept)
    state = weakref.ref(cache.find(tuple(range(40)), gone, None).untyped_storage())
    del gone
    gc.collect()
    assert cache.size == 30 * PER_TOKEN
    assert state() is None


def test_the_longest_unused_goes_first():
    """A full cache drops what was not used for longest; an entry larger than the budget is not kept."""
    cache = PrefixCache(70 * PER_TOKEN)
    put(cache, range(100, 130))
    put(cache, range(200, 230))
    assert found(cache, range(100, 131))
    put(cache, range(300, 330))
    assert found(cache, range(200, 231)) is None
    assert found(cache, range(100, 131))
    assert found(cache, range(300, 331))
    put(cache, range(400, 471))
    assert found(cache, range(400, 480)) is None
    assert cache.size == 60 * PER_TOKEN


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=80).map(lambda bits: [7] * 15 + bits), max_size=12))
def test_what_is_found_is_always_a_true_start(texts):
    """Whatever was put and dropped, a found state is that of the prompt's own first tokens."""
    cache = PrefixCache(200 * PER_TOKEN)
    for text in texts:
        state = found(cache, text)
        assert state is None or (state == text[: len(state)] and len(state) < len(text))
        put(cache, text)
        assert cache.size <= 200 * PER_TOKEN


def counted(monkeypatch):
    """Count the prompt tokens that are really read."""
    read = []
    prefill = SlotDecoder.prefill
    monkeypatch.setattr(
        SlotDecoder, "prefill", lambda self, chunks: read.append(sum(c.count for c in chunks)) or prefill(self, chunks)
    )
    return read


def test_a_second_turn_reads_only_what_is_new(kit, monkeypatch):
    """A prompt that goes on from an earlier prompt and its answer reads the rest only, and says the same."""
    base = kit.base("qwen3")
    adapter = kit.adapter(base)
    read = counted(monkeypatch)
    sampler = Sampler(base)
    first = kit.request(kit.prompt(50), adapter=adapter, max_tokens=20, cache_key="tenant")
    (answer,) = kit.run(sampler, first)
    again = kit.request((*first.prompt, *answer.tokens, 1, 2, 3), adapter=adapter, cache_key="tenant")
    (own,) = kit.run(sampler, again)
    assert read == [50, 4]
    (fresh,) = kit.run(Sampler(base, prefix_cache_bytes=0), again)
    assert own.tokens == fresh.tokens
    kit.run(sampler, kit.request(again.prompt, adapter=adapter, cache_key="another"))
    assert read[2:] == [73, 73]


def test_the_same_prompt_while_the_first_is_running(kit, monkeypatch):
    """A request that arrives later with the prompt of a running one reads one token."""
    read = counted(monkeypatch)
    sampler = Sampler(kit.base("llama"))
    kit.submit(sampler, kit.request(kit.prompt(40), max_tokens=30))
    for _ in range(3):
        sampler.step()
    kit.submit(sampler, kit.request(kit.prompt(40), seed=1))
    kit.drain(sampler)
    assert read == [40, 1]


def test_equal_prompts_are_read_once(kit, monkeypatch):
    """Requests that come together with the same prompt, adapter and key share one reading; others do not."""
    base = kit.base("llama")
    adapter = kit.adapter(base)
    read = counted(monkeypatch)
    prompt = kit.prompt(30)
    own = kit.run(
        Sampler(base),
        *(kit.request(prompt, adapter=adapter, seed=seed) for seed in range(8)),
        kit.request(prompt),
        kit.request(prompt, cache_key="other"),
    )
    assert read == [90]
    assert len({generation.tokens for generation in own}) == 9
    assert own[8].tokens == own[9].tokens


def test_scored_prompts_are_read_whole(kit, monkeypatch):
    """Prompt logprobs need every logit, so what is cached is not used for them, and they still share one reading."""
    base = kit.base("llama")
    read = counted(monkeypatch)
    sampler = Sampler(base)
    prompt = kit.prompt(40)
    kit.run(sampler, kit.request(prompt))
    asked = [kit.request(prompt, prompt_logprobs=True, topk_prompt_logprobs=top, max_tokens=1) for top in (2, 0, 1)]
    with_two, with_none, with_one = kit.run(sampler, *asked)
    assert read == [40, 40]
    assert with_two.prompt_logprobs == with_none.prompt_logprobs == with_one.prompt_logprobs
    assert with_none.topk_prompt_logprobs is None
    assert [top[:1] for top in with_two.topk_prompt_logprobs[1:]] == list(with_one.topk_prompt_logprobs[1:])
