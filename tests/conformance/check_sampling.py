"""Samples and versions: what each kind of sampling client is served by, and what its parameters do."""

from __future__ import annotations

import asyncio

import pytest
from baseten.loops import ModelInput, SamplingClient, SamplingParams
from published import PROMPT, SECONDS, TINY, datum, learn, logprobs, publish

MODEL_INPUT = ModelInput.from_ints(PROMPT)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def base(service):
    """A sampler of the base model alone."""
    sampler = service.create_sampling_client(base_model=TINY)
    yield sampler
    sampler.close()


def test_versions_increase_and_are_told(trainer):
    """Every publish is a higher version; a sample says which version it is of, at least the one insisted on."""
    told = []
    for _ in range(3):
        learn(trainer)
        sampler = publish(trainer, "same-name")
        told.append(sampler.sample(MODEL_INPUT, 1, GREEDY).policy_version)
        assert told[-1] >= (sampler._min_policy_version or 0) > 0
        sampler.close()
    assert told == sorted(set(told))


def test_a_sample_is_held_until_its_version_is_there(trainer):
    """A client that insists on a version to come is served by it as soon as it is published."""

    async def insist() -> tuple[int, bool]:
        ahead = SamplingClient(
            base_model=TINY, deployment=first._deployment, api_key=trainer._api_key, min_policy_version=floor + 1
        )
        waiting = asyncio.create_task(ahead.sample_async(MODEL_INPUT, 1, GREEDY))
        await asyncio.sleep(0.3)
        early = waiting.done()
        newer = await trainer.save_weights_and_get_sampling_client_async("newer")
        answer = await waiting
        for one in (ahead, newer):
            await one.aclose()
        return answer.policy_version, early

    first = publish(trainer, "first")
    floor = first._min_policy_version
    learn(trainer)
    assert asyncio.run(insist()) == (floor + 1, False)
    first.close()


def test_seeds_decide(base):
    """The same seed gives the same tokens, another one others; several samples of one request differ."""

    def tokens(seed: int, count: int = 1) -> list[list[int]]:
        answer = base.sample(MODEL_INPUT, count, SamplingParams(max_tokens=16, seed=seed))
        return [list(one.tokens) for one in answer.sequences]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    first, second = tokens(7, 2)
    assert first != second


def test_greedy_tokens_are_the_likeliest(trainer):
    """At temperature 0 each token is the top one of the model's own table of log-probabilities."""
    sampler = publish(trainer, "greedy")
    (sequence,) = sampler.sample(MODEL_INPUT, 1, GREEDY).sequences
    tokens = PROMPT + list(sequence.tokens)
    scored = sampler.sample(
        ModelInput.from_ints(tokens), 1, GREEDY, include_prompt_logprobs=True, topk_prompt_logprobs=3
    )
    assert scored.prompt_logprobs[0] is None
    for place in range(len(PROMPT), len(tokens)):
        best = max(scored.topk_prompt_logprobs[place], key=lambda pair: pair[1])
        assert best[0] == tokens[place]
        assert scored.prompt_logprobs[place] == pytest.approx(best[1], abs=1e-4)
    sampler.close()


def test_prompts_are_scored(base, trainer):
    """compute_logprobs of the base model is what an untrained adapter's forward gives."""
    first, *scored = base.compute_logprobs(MODEL_INPUT)
    assert first is None
    (trained,) = logprobs(trainer.forward([datum(PROMPT)], "cross_entropy").result(timeout=SECONDS))
    assert scored == pytest.approx(trained, abs=1e-3)


def test_samples_stop_where_they_are_told(base):
    """A stop string is not in the text; a stop token ends the tokens; else the length does."""
    params = {"max_tokens": 24, "seed": 3}
    (free,) = base.sample(MODEL_INPUT, 1, SamplingParams(**params)).sequences
    assert (free.stop_reason, len(free.tokens)) == ("length", 24)
    by_id = free.tokens[10]
    (stopped,) = base.sample(MODEL_INPUT, 1, SamplingParams(stop=[by_id], **params)).sequences
    assert stopped.stop_reason == "stop"
    assert list(stopped.tokens) == list(free.tokens[: list(free.tokens).index(by_id) + 1])
    letter = next(one for one in free.text[4:] if one.isascii() and one.isprintable())
    for stop in (letter, [letter]):
        (cut,) = base.sample(MODEL_INPUT, 1, SamplingParams(stop=stop, **params)).sequences
        assert (cut.stop_reason, cut.text) == ("stop", free.text.partition(letter)[0])


def test_the_choice_is_narrowed(base):
    """top_k=1 is greedy; a tiny top_p as well."""
    (greedy,) = base.sample(MODEL_INPUT, 1, GREEDY).sequences
    for params in ({"top_k": 1}, {"top_p": 1e-6}):
        (narrow,) = base.sample(MODEL_INPUT, 1, SamplingParams(max_tokens=8, seed=5, **params)).sequences
        assert list(narrow.tokens) == list(greedy.tokens)


async def test_many_samples_at_once(base):
    """Sixty-four concurrent samples all come, each as its seed has it when it is alone."""
    params = [SamplingParams(max_tokens=6, seed=seed) for seed in range(64)]
    answers = await asyncio.gather(*(base.sample_async(MODEL_INPUT, 1, one) for one in params))
    alone = await base.sample_async(MODEL_INPUT, 1, params[20])
    assert list(answers[20].sequences[0].tokens) == list(alone.sequences[0].tokens)
    assert {len(answer.sequences[0].tokens) for answer in answers} == {6}


def test_samplers_say_what_they_serve(base, trainer):
    """A base model's sampler has no adapter, a run's has one."""
    assert (base.get_base_model(), base.discover_base_model_name(), base.discover_adapter_name()) == (TINY, TINY, None)
    sampler = publish(trainer, "served")
    assert sampler.discover_base_model_name() == TINY
    assert sampler.discover_adapter_name() is not None
    sampler.close()


def test_a_checkpoint_is_sampled_from_until_a_policy_takes_over(trainer):
    """create_sampling_client serves the named checkpoint, whatever is staged, until a newer policy is made live."""
    learn(trainer)
    path = trainer.save_weights_for_sampler("early").result(timeout=SECONDS).path
    assert path == f"bt://loops:{trainer.run_id}/sampler_weights/early"
    (wanted,) = logprobs(trainer.forward([datum(PROMPT)], "cross_entropy").result(timeout=SECONDS))
    learn(trainer, 3)
    trainer.save_weights_for_sampler("late").result(timeout=SECONDS)
    sampler = trainer.create_sampling_client(path)
    assert sampler.compute_logprobs(MODEL_INPUT)[1:] == pytest.approx(wanted, abs=1e-3)
    live = publish(trainer, "live")
    assert sampler.compute_logprobs(MODEL_INPUT) == pytest.approx(live.compute_logprobs(MODEL_INPUT), abs=1e-3)
    assert sampler.compute_logprobs(MODEL_INPUT)[1:] != pytest.approx(wanted, abs=1e-3)
    for one in (sampler, live):
        one.close()
