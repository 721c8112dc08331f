from __future__ import annotations

import gc
import tracemalloc
import weakref

import pytest
import torch

from tg_tinker.engine.sampling.sampler import Sampler


def tensor_bytes():
    """The memory of every tensor that Python still knows, shared memory once."""
    storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_thousand_requests_leave_nothing(kit):
    """Submitting, finishing and cancelling 2,000 requests on 200 adapter versions leaves Python's memory flat."""
    base = kit.base("llama", num_hidden_layers=1, hidden_size=16, intermediate_size=16, vocab_size=258)
    sampler = Sampler(base, prefix_cache_bytes=1 << 18)

    def round_of(count):
        adapter = None
        for number in range(count):
            if number % 10 == 0:
                adapter = kit.adapter(base, number, rank=1)
            handle = sampler.submit(kit.request(kit.prompt(20, number), adapter=adapter, max_tokens=2), kit.Recorder())
            if number % 7 == 0:
                sampler.cancel(handle)
            if number % 5 == 0:
                sampler.step()
        kit.drain(sampler)
        gc.collect()

    round_of(200)
    tracemalloc.start()
    before, held = tracemalloc.get_traced_memory()[0], tensor_bytes()
    round_of(2000)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 100_000
    assert tensor_bytes() <= held + (1 << 18)
    assert len(sampler._prefixes._shelves) <= 2


@pytest.mark.parametrize("saved", [(), ("lm_head", "k_proj")])
def test_published_versions_are_collectable(kit, saved):
    """A version that nobody samples from any more is freed, its laid-out factors and cached prefixes with it."""
    base = kit.base("qwen3")
    targets = ("q_proj", "down_proj")
    sampler = Sampler(base)
    for ending in ("done", "cancelled", "failed"):
        adapters = [kit.adapter(base, seed, targets=targets, saved=saved) for seed in range(5)]
        recorders = [kit.Recorder() for _ in adapters]
        handles = [
            sampler.submit(kit.request(kit.prompt(40), adapter=adapter), recorder)
            for adapter, recorder in zip(adapters, recorders, strict=True)
        ]
        for _ in range(3):
            sampler.step()
        if ending == "cancelled":
            for handle in handles:
                sampler.cancel(handle)
        if ending == "failed":
            for decoder in sampler._decoder._decoders():
                decoder._weights = None
        kit.drain(sampler)
        assert all((recorder.error is not None) == (ending == "failed") for recorder in recorders)
        gone = [weakref.ref(adapter) for adapter in adapters]
        del adapters
        gc.collect()
        assert [reference() for reference in gone] == [None] * 5
        assert sampler._prefixes.size == 0
        assert len(sampler._decoder._own) == 0
        assert len(sampler._decoder._shared._adapters) == 0
