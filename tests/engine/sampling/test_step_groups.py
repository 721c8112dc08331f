from __future__ import annotations

import gc
import weakref

import pytest
import torch
from fixtures.small_models import make

from tg_tinker.engine.sampling.decoder import Chunk
from tg_tinker.engine.sampling.sampler import Sampler
from tg_tinker.engine.sampling.steps.padded_cache import _RoomyLayer
from tg_tinker.engine.sampling.steps.step_decoder import StepDecoder


def tensor_bytes():
    """The memory of every tensor that Python still knows, shared memory once."""
    storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def read(decoder, tokens, adapter=None):
    """A prompt that is read."""
    prompt = decoder.open(tokens, adapter, None)
    decoder.prefill([Chunk(prompt, len(tokens), 1)])
    return prompt


def layers_of(decoder):
    """The layers of the cache of the only group."""
    (group,) = decoder._groups
    return layers_of_group(group)


def layers_of_group(group):
    """The layers of its cache."""
    return group._cache.layers


@pytest.fixture
def short_of_memory(monkeypatch):
    """Lets the n-th block of keys and values that is made from now on find no memory."""
    state = {"left": None}
    reserve = _RoomyLayer.reserve

    def scarce(layer, rows, length):
        before = layer.buffers
        if state["left"] == 0:
            state["left"] = None
            raise torch.OutOfMemoryError("out of memory")
        reserve(layer, rows, length)
        if layer.buffers is not before and state["left"] is not None:
            state["left"] -= 1

    monkeypatch.setattr(_RoomyLayer, "reserve", scarce)
    return lambda after: state.update(left=after)


@torch.inference_mode()
def test_rows_give_the_logits_of_the_model_while_others_come_and_go(kit):
    """Sequences that join, leave, grow and are moved about have the model's own logits at every token."""
    base = kit.wrap(make("gemma2"))
    decoder = StepDecoder(base)
    texts = {}
    generator = torch.Generator().manual_seed(0)
    for tick in range(150):
        if tick % 9 == 0:
            tokens = kit.prompt((40, 3, 90, 17)[tick // 9 % 4], tick)
            texts[decoder.join(read(decoder, tokens), 1)] = list(tokens)
        if tick in (14, 31, 60, 61, 62, 100):
            gone = list(texts)[tick % len(texts)]
            decoder.leave(gone)
            del texts[gone]
            if not texts:
                continue
        for sequence in decoder.crowded():
            decoder.grow(sequence)
        batch = decoder.batch()
        assert set(batch) == set(texts)
        tokens = torch.randint(0, 262, (len(batch),), generator=generator).tolist()
        logits = decoder.decode(tokens)
        for sequence, token in zip(batch, tokens, strict=True):
            texts[sequence].append(token)
        row = tick % len(batch)
        expected = kit.logits(base, None, texts[batch[row]])[-1]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-3)
        assert all(sequence.length == len(texts[sequence]) for sequence in batch)


@torch.inference_mode()
def test_another_sequences_nan_is_not_seen(kit):
    """A row that held NaN is clean for the sequence that gets it next, and for its neighbours while it is there."""
    base = kit.wrap(make("phi"))
    decoder = StepDecoder(base)
    healthy = decoder.join(read(decoder, kit.prompt(40)), 1)
    sick = decoder.join(read(decoder, kit.prompt(12)), 1)
    for layer in layers_of(decoder):
        for buffer in layer.buffers:
            buffer[1] = torch.nan
    assert decoder.batch() == (healthy, sick)
    expected = kit.logits(base, None, [*kit.prompt(40), 5])[-1]
    torch.testing.assert_close(decoder.decode([5, 5])[0], expected, rtol=0, atol=1e-3)
    decoder.leave(sick)
    heir = decoder.join(read(decoder, kit.prompt(8)), 1)
    assert decoder.batch() == (healthy, heir)
    expected = kit.logits(base, None, [*kit.prompt(8), 6])[-1]
    torch.testing.assert_close(decoder.decode([6, 6])[1], expected, rtol=0, atol=1e-3)


@torch.inference_mode()
def test_places_are_freed(kit):
    """What a group needs shrinks with its sequences at the latest when it grows; with the last of them it goes."""
    decoder = StepDecoder(kit.wrap(make("phi")))
    prompt = read(decoder, kit.prompt(200))
    sequences = [decoder.join(prompt, 1) for _ in range(20)]
    short = decoder.join(read(decoder, kit.prompt(10)), 1)
    assert layers_of(decoder)[0].buffers[0].shape[:3] == (22, 2, 264)
    for sequence in sequences:
        decoder.leave(sequence)
    while not decoder.crowded():
        decoder.batch()
        decoder.decode([1])
    decoder.grow(short)
    assert short.length == 74
    assert layers_of(decoder)[0].buffers[0].shape[:3] == (1, 2, 74 + 64)
    kept = [weakref.ref(buffer) for buffer in layers_of(decoder)[0].buffers]
    decoder.leave(short)
    del short, sequence, sequences
    assert decoder._groups == []
    assert [buffer() for buffer in kept] == [None] * 2


def test_a_long_row_does_not_lengthen_short_ones(kit):
    """Short sequences beside a long one need no room for its length, and all have the tokens that they have alone."""
    base = kit.wrap(make("phi", max_position_embeddings=2048))
    requests = [kit.request(kit.prompt(length), max_tokens=30) for length in (9, 1500, 12, 5, 700, 20, 1400)]
    alone = [kit.run(Sampler(base), request)[0].tokens for request in requests]
    sampler = Sampler(base, prefix_cache_bytes=0)
    recorders = kit.submit(sampler, *requests)
    while not all(recorder.tokens for recorder in recorders):
        sampler.step()
    held = sum(layers[0].buffers[0][:, 0, :, 0].numel() for layers in map(layers_of_group, sampler._decoder._groups))
    assert held < 2 * (1500 + 1400 + 700 + 4 * 120)
    kit.drain(sampler)
    assert [recorder.result.tokens for recorder in recorders] == alone


@pytest.mark.parametrize("family", ["phi", "roberta"])
def test_what_ends_leaves_nothing(kit, family):
    """Requests that finish, fail or are cancelled leave neither tensors nor their adapters behind."""
    base = kit.wrap(make(family))
    sampler = Sampler(base, prefix_cache_bytes=0)

    def round_of(count):
        versions = [kit.adapter(base, seed, rank=1) for seed in range(3)]
        for number in range(count):
            request = kit.request(kit.prompt(20, number), adapter=versions[number % 3], max_tokens=9)
            handle = sampler.submit(request, kit.Recorder())
            sampler.step()
            if number % 7 == 0:
                sampler.cancel(handle)
        kit.drain(sampler)
        return [weakref.ref(version) for version in versions]

    assert round_of(20)
    gc.collect()
    held = tensor_bytes()
    gone = round_of(60)
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert tensor_bytes() <= held


def test_who_is_cancelled_between_ticks_takes_nobody_along(kit):
    """A request that is cancelled between two ticks leaves a gap that the others do not notice."""
    base = kit.wrap(make("gemma"))
    requests = [kit.request(kit.prompt(4 + 5 * n), seed=n, max_tokens=30) for n in range(5)]
    undisturbed = [own.tokens for own in kit.run(Sampler(base), *requests)]
    sampler = Sampler(base)
    recorders = [kit.Recorder() for _ in requests]
    handles = [sampler.submit(*pair) for pair in zip(requests, recorders, strict=True)]
    for number in (0, 3):
        for _ in range(5):
            sampler.step()
        assert sampler.cancel(handles[number])
    kit.drain(sampler)
    assert [recorders[n].result.tokens for n in (1, 2, 4)] == [undisturbed[n] for n in (1, 2, 4)]


@pytest.mark.parametrize("layer", [0, 2])
def test_who_finds_no_memory_fails_alone(kit, short_of_memory, layer):
    """A request that finds no memory when it joins fails; those that are running get the tokens they would have."""
    base = kit.wrap(make("phi"))
    first = [kit.request(kit.prompt(9 + n), seed=n, max_tokens=20) for n in range(2)]
    undisturbed = [own.tokens for own in kit.run(Sampler(base), *first)]
    sampler = Sampler(base)
    running = kit.submit(sampler, *first)
    for _ in range(3):
        sampler.step()
    short_of_memory(layer)
    failing, later = kit.submit(sampler, *(kit.request(kit.prompt(60 + n), max_tokens=20) for n in range(2)))
    kit.drain(sampler)
    assert {failing.error is None, later.error is None} == {True, False}
    assert (failing.error or later.error).code == "OUT_OF_MEMORY"
    assert [recorder.result.tokens for recorder in running] == undisturbed


@pytest.mark.parametrize("layer", [0, 1])
def test_who_cannot_grow_fails_alone(kit, short_of_memory, layer):
    """When there is no memory for more tokens, one request of the group fails and makes room; the others go on."""
    base = kit.wrap(make("phi"))
    requests = [kit.request(kit.prompt(9 + n), seed=n, max_tokens=90) for n in range(3)]
    undisturbed = [own.tokens for own in kit.run(Sampler(base), *requests)]
    sampler = Sampler(base)
    recorders = kit.submit(sampler, *requests)
    for _ in range(5):
        sampler.step()
    short_of_memory(layer)
    kit.drain(sampler)
    failed = [recorder for recorder in recorders if recorder.error is not None]
    assert [recorder.error.code for recorder in failed] == ["OUT_OF_MEMORY"]
    rest = [n for n, recorder in enumerate(recorders) if recorder.error is None]
    assert [recorders[n].result.tokens for n in rest] == [undisturbed[n] for n in rest]
