from __future__ import annotations

import pytest
import torch
from fixtures.small_models import make

from tg_tinker.engine.sampling.decoder import Chunk
from tg_tinker.engine.sampling.steps.prompt_reading import pack
from tg_tinker.engine.sampling.steps.step_decoder import StepDecoder


@torch.inference_mode()
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "deepseek-v3"])
def test_pieces_of_many_prompts_have_the_logits_of_the_model(kit, family):
    """Whatever pieces of prompts are read together, each wanted logit is that of one pass over the whole prompt."""
    base = kit.wrap(make(family))
    decoder = StepDecoder(base)
    prompts = [decoder.open(kit.prompt(length), None, None) for length in (30, 26, 9, 31, 40)]
    rounds = [{0: 5, 1: 5, 3: 12}, {0: 25, 1: 21, 2: 9, 3: 7}, {4: 40, 3: 12}]
    rows = {prompt: [] for prompt in prompts}
    for pieces in rounds:
        chunks = [Chunk(prompts[n], count, max(0, count - n)) for n, count in pieces.items()]
        logits = decoder.prefill(chunks).split([chunk.wanted for chunk in chunks])
        for chunk, part in zip(chunks, logits, strict=True):
            rows[chunk.prompt].append((chunk.prompt.done, part))
    for prompt in prompts:
        assert prompt.remaining == 0
        expected = kit.logits(base, None, prompt.tokens)
        for done, part in rows[prompt]:
            torch.testing.assert_close(part, expected[done - len(part) : done], rtol=0, atol=1e-3)


def test_only_what_is_alike_shares_a_pass(kit):
    """Prompts of other adapters, or further along, are read in passes of their own."""
    base = kit.wrap(make("phi"))
    decoder = StepDecoder(base)
    adapter = kit.adapter(base)
    prompts = [decoder.open(kit.prompt(20, n), version, None) for n, version in enumerate((None, adapter, None, None))]
    decoder.prefill([Chunk(prompts[3], 6, 0)])
    chunks = [Chunk(prompt, 10, 1) for prompt in prompts]
    assert pack(chunks) == [[chunks[0], chunks[2]], [chunks[1]], [chunks[3]]]


def test_a_prompt_keeps_nothing_of_those_it_was_read_with(kit):
    """What is kept of a prompt is as large as the prompt, and no view of the pass that others shared."""
    decoder = StepDecoder(kit.wrap(make("phi")))
    prompts = [decoder.open(kit.prompt(length), None, None) for length in (20, 18, 19)]
    decoder.prefill([Chunk(prompt, len(prompt.tokens), 1) for prompt in prompts])
    for prompt in prompts:
        for part in (part for pair in prompt.state for part in pair):
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
            assert part.shape[1] == len(prompt.tokens)
