from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tg_tinker.engine.sampling.decoder import Chunk
from tg_tinker.engine.sampling.slots import fused_weights
from tg_tinker.engine.sampling.slots.slot_decoder import SlotDecoder
from tg_tinker.errors import InvalidRequestError

FAMILIES = ["llama", "llama-biased", "llama-scaled", "qwen2", "qwen3"]


def slots(base):
    """A decoder over the base model's own weights."""
    return SlotDecoder(base, fused_weights.read(base.model), max_length=512)


def read_whole(decoder, tokens, adapter=None, prefix=None, pieces=(10**6,)):
    """Read a prompt in pieces; give the prompt and every logit row after its prefix."""
    prompt = decoder.open(tokens, adapter, prefix)
    parts = []
    for piece in pieces:
        count = min(piece, prompt.remaining)
        parts.append(decoder.prefill([Chunk(prompt, count, count)]))
    assert not prompt.remaining
    return prompt, torch.cat(parts)


@pytest.mark.parametrize("pieces", [(10**6,), (1, 30, 7, 10**6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_give_the_logits_of_the_model(kit, family, pieces):
    """A prompt read at once or in pieces gives the logits of the model's forward pass, adapter or not."""
    base = kit.base(family)
    decoder = slots(base)
    for adapter in (None, kit.adapter(base)):
        tokens = kit.prompt(90)
        _, own = read_whole(decoder, tokens, adapter, pieces=pieces)
        torch.testing.assert_close(own, kit.logits(base, adapter, tokens), rtol=0, atol=2e-4)


@pytest.mark.parametrize("adapters", [1, 2, 6])
@pytest.mark.parametrize("family", ["llama-biased", "qwen3"])
def test_decoding_gives_the_logits_of_the_model(kit, family, adapters):
    """Sequences of many lengths and adapters that grow through the pools give the model's logits at every token."""
    base = kit.base(family)
    decoder = slots(base)
    versions = [kit.adapter(base, seed, rank=1 + seed) for seed in range(adapters)]
    texts = [list(kit.prompt(length)) for length in (3, 62, 63, 64, 65, 120, 127, 130, 9, 200)]
    owners = {}
    for number, text in enumerate(texts):
        adapter = versions[number % adapters] if number % 5 or adapters == 1 else None
        prompt, _ = read_whole(decoder, tuple(text), adapter)
        owners[decoder.join(prompt, 1)] = text
    for step in range(6):
        for sequence in list(decoder.crowded()):
            decoder.grow(sequence)
        batch = decoder.batch()
        assert decoder.batch() is batch
        tokens = [(17 * step + row) % 256 for row in range(len(batch))]
        own = decoder.decode(tokens)
        for row, sequence in enumerate(batch):
            owners[sequence].append(tokens[row])
            assert sequence.length == len(owners[sequence])
            expected = kit.logits(base, sequence.adapter, owners[sequence])[-1]
            torch.testing.assert_close(own[row], expected, rtol=0, atol=3e-4)
        if step == 2:  # a hole in the middle of each pool is filled, and nobody notices
            for sequence in batch[::3]:
                decoder.leave(sequence)


def test_a_prompt_serves_many_sequences(kit):
    """Sequences that join from one prompt go on independently."""
    base = kit.base("llama")
    decoder = slots(base)
    tokens = kit.prompt(20)
    prompt, _ = read_whole(decoder, tokens)
    joined = [decoder.join(prompt, 5) for _ in range(3)]
    assert list(decoder.batch()) == joined
    own = decoder.decode([1, 2, 3])
    for row in range(3):
        torch.testing.assert_close(own[row], kit.logits(base, None, [*tokens, row + 1])[-1], rtol=0, atol=2e-4)


def test_a_prefix_replaces_reading_it(kit):
    """A prompt that starts from the state of a prompt or of a running sequence gives the same logits."""
    base = kit.base("qwen3")
    adapter = kit.adapter(base)
    decoder = slots(base)
    tokens = kit.prompt(50)
    prompt, _ = read_whole(decoder, tokens, adapter)
    sequence = decoder.join(prompt, 1)
    decoder.decode([5])
    longer = (*tokens, 5, 6, 7, 8)
    expected = kit.logits(base, adapter, longer)
    for state in (decoder.read(prompt), decoder.read(sequence)):
        _, own = read_whole(decoder, longer, adapter, prefix=state)
        torch.testing.assert_close(own, expected[state.shape[3] :], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "targets", [("q_proj",), ("v_proj", "down_proj"), ("lm_head", "up_proj"), ("o_proj", "gate_proj")]
)
def test_adapters_on_some_layers_only(kit, targets):
    """Adapters may cover any subset of the layers, the output head included, and mix with others in a batch."""
    base = kit.base("llama")
    decoder = slots(base)
    versions = [kit.adapter(base, 1, targets=targets), kit.adapter(base, 2), None, kit.adapter(base, 3, rank=9)]
    versions.append(kit.adapter(base, 4, targets=targets))
    chunks = [Chunk(decoder.open(kit.prompt(6 + n), adapter, None), 6 + n, 1) for n, adapter in enumerate(versions)]
    own = decoder.prefill(chunks)
    for row, adapter in enumerate(versions):
        expected = kit.logits(base, adapter, kit.prompt(6 + row))[-1]
        torch.testing.assert_close(own[row], expected, rtol=0, atol=3e-4)


def test_fusing_shares_memory_with_the_model(kit):
    """The fused matrices are the model's own memory: nothing is stored twice, and fusing again finds the same."""
    base = kit.base("qwen2")
    expected = kit.logits(base, None, kit.prompt(9))
    first, again = fused_weights.read(base.model), fused_weights.read(base.model)
    attention = base.model.model.layers[1].self_attn
    for weights in (first, again):
        layer = weights.layers[1]
        assert layer.qkv.weight.data_ptr() == attention.q_proj.weight.data_ptr()
        size = base.model.config.hidden_size * base.model.dtype.itemsize
        assert attention.k_proj.weight.data_ptr() == layer.qkv.weight.data_ptr() + size * attention.q_proj.out_features
        assert torch.equal(layer.gate_up.weight[96:], base.model.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(kit.logits(base, None, kit.prompt(9)), expected)


def test_another_sequences_nan_is_not_seen(kit):
    """A row that held NaN is clean for the sequence that gets it next, and for its neighbours while it is there."""
    base = kit.base("llama")
    decoder = slots(base)
    prompt, _ = read_whole(decoder, kit.prompt(40))
    sick, healthy = decoder.join(prompt, 1), decoder.join(prompt, 1)
    for layer in sick.pool.layers:
        layer[:, sick.row] = float("nan")
    own = decoder.decode([1, 1])
    assert own[0].isnan().all()
    assert own[1].isfinite().all()
    decoder.leave(sick)
    short, _ = read_whole(decoder, kit.prompt(4))
    decoder.join(short, 1)
    assert decoder.decode([1, 1]).isfinite().all()
    assert healthy in decoder.batch()


def test_places_are_freed(kit):
    """When the last sequence of a pool leaves, its memory goes; a finished adapter leaves nothing behind."""
    base = kit.base("llama")
    decoder = slots(base)
    adapter = kit.adapter(base)
    prompt, _ = read_whole(decoder, kit.prompt(10), adapter)
    sequences = [decoder.join(prompt, 1) for _ in range(20)]
    decoder.decode([1] * 20)
    pool = weakref.ref(sequences[0].pool)
    for sequence in sequences[:18]:
        decoder.leave(sequence)
    decoder.decode([1, 1])
    assert pool().layers[0].shape[1] == 16
    gone = weakref.ref(adapter)
    for sequence in sequences[18:]:
        decoder.leave(sequence)
    del adapter, prompt, sequences, sequence
    gc.collect()
    assert pool() is None
    assert gone() is None


def test_an_adapter_of_another_model_is_refused(kit):
    """An adapter whose layers do not fit is an error that names the field."""
    other = kit.adapter(kit.base("llama", hidden_size=64))
    decoder = slots(kit.base("llama"))
    with pytest.raises(InvalidRequestError) as raised:
        decoder.open((1, 2), other, None)
    assert raised.value.field == "adapter"


def test_what_is_not_known_is_named(kit):
    """Architectures and settings that this forward pass does not have are left to the other decoder, with a reason."""
    assert fused_weights.unsupported(kit.base("qwen3").model) is None
    assert "gpt_neox" in fused_weights.unsupported(kit.base("gpt-neox").model)
    assert "gelu" in fused_weights.unsupported(kit.base("llama", hidden_act="gelu").model)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 30,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, rope_parameters=dynamic))
    assert "dynamic" in fused_weights.unsupported(model)
    sliding = Qwen2Config(
        **shape, num_key_value_heads=1, use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    assert "sliding" in fused_weights.unsupported(Qwen2ForCausalLM(sliding))


def test_bfloat16_models_decode(kit):
    """A bfloat16 model gives logits near its own forward pass."""
    base = kit.base("qwen3")
    half = kit.wrap(base.model.bfloat16())
    adapter = kit.adapter(half)
    _, own = read_whole(slots(half), kit.prompt(20), adapter)
    expected = kit.logits(half, adapter, kit.prompt(20))
    assert own.dtype == torch.bfloat16
    assert float((own - expected).float().abs().mean()) < 0.02 * float(expected.float().std())
