from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.engine.sampling.decoder import Prompt
from tg_tinker.engine.sampling.generation import GenerationRequest
from tg_tinker.engine.sampling.prefill import PrefillJob, pace, share_out, tokens_a_tick
from tg_tinker.engine.sampling.stream import Stream


def job_of(length, done=0, **asked):
    """A job for a prompt of that length."""
    request = GenerationRequest(prompt=(1,) * length, max_tokens=1, seed=0, **asked)
    stream = Stream(1, request, None, limit=1, eos=frozenset(), decode=lambda _ids: "")
    return PrefillJob(Prompt(request.prompt, None, done), stream)


def shares(jobs, budget, *, whole=False):
    """What each job gets, by its place."""
    return {jobs.index(job): count for job, count in share_out(jobs, budget, whole=whole)}


def test_short_prompts_pass_a_long_one_that_still_moves():
    """The oldest gets a quarter, then the shortest rests go first."""
    jobs = [job_of(4000), job_of(100), job_of(90), job_of(5, done=1)]
    assert shares(jobs, 256) == {0: 64, 3: 4, 2: 90, 1: 98}


def test_a_lone_prompt_gets_everything():
    """Nothing is held back for nobody."""
    assert shares([job_of(4000)], 256) == {0: 256}


def test_scored_prompts_are_read_in_small_pieces():
    """Prompts whose logits are all wanted share a smaller budget, and the others use the rest."""
    jobs = [job_of(400, prompt_logprobs=True), job_of(500, topk_prompt_logprobs=2), job_of(300)]
    assert shares(jobs, 1000) == {0: 128, 2: 300}


def test_whole_prompts_are_not_cut():
    """Where a prompt cannot be cut, those that fit are read, and always the shortest."""
    jobs = [job_of(500), job_of(300), job_of(100)]
    assert shares(jobs, 450, whole=True) == {2: 100, 1: 300}
    assert shares([job_of(5000)], 256, whole=True) == {0: 5000}


@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=12), st.integers(4, 600))
def test_every_share_is_possible_and_the_oldest_moves(jobs, budget):
    """No job gets more than it has left, the budget holds, the oldest gets something."""
    made = [job_of(length, prompt_logprobs=scored) for length, scored in jobs]
    given_out = shares(made, budget)
    assert sum(given_out.values()) <= budget
    assert all(0 < count <= jobs[place][0] for place, count in given_out.items())
    assert 0 in given_out
    if not any(scored for _, scored in jobs):
        assert sum(given_out.values()) == min(budget, sum(length for length, _ in jobs))


def test_large_models_read_less_a_tick():
    """What a tick reads beside running streams falls with the model's size, between bounds; a GPU reads more."""
    cpu = torch.device("cpu")
    assert [pace(size, cpu) for size in (10**6, 100_000_000, 10**9)] == [256, 100, 32]
    assert pace(7 * 10**9, torch.device("cuda")) == 714


def test_many_that_wait_outweigh_few_that_run():
    """A tick reads up to four times as much when nobody, or hardly anybody, would be stalled by it."""
    assert tokens_a_tick(100, reading=1, running=0) == 400
    assert [tokens_a_tick(100, reading=reading, running=10) for reading in (1, 20, 500)] == [100, 200, 400]
