"""The loop that this wire is for: publish, sample, score, take a policy-gradient step."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams
from published import PROMPT, SECONDS, active, logprobs, publish, rollout

WANTED = frozenset(range(97, 123))  # lower-case letters
SAMPLING = SamplingParams(max_tokens=12, temperature=1.0)
STEP = AdamParams(learning_rate=5e-3)
GROUP = 16


def reward(tokens: list[int]) -> float:
    """The share of lower-case letters."""
    return sum(token in WANTED for token in tokens) / len(tokens)


def experience(sequences: list[Any]) -> tuple[list[Datum], float]:
    """A group's data, its advantages centred, and its mean reward."""
    rewards = [reward(one.tokens) for one in sequences]
    mean = sum(rewards) / len(rewards)
    data = [
        rollout(PROMPT, list(one.tokens), list(one.logprobs), worth - mean)
        for one, worth in zip(sequences, rewards, strict=True)
    ]
    return data, mean


def test_a_step_of_reinforcement_learning(trainer):
    """Sampler and trainer agree on what was sampled; the step makes the rewarded likelier; versions increase."""
    sampler = publish(trainer, "policy")
    answer = sampler.sample(ModelInput.from_ints(PROMPT), GROUP, SAMPLING)
    assert len(answer.sequences) == GROUP
    data, _ = experience(answer.sequences)
    before = trainer.forward_backward(data, "importance_sampling").result(timeout=SECONDS)
    for one, sequence, values in zip(data, answer.sequences, logprobs(before), strict=True):
        advantage = one.loss_fn_inputs["advantages"].data[-1]
        if advantage:
            assert active(one, values) == pytest.approx(sequence.logprobs, abs=1e-3)
    assert trainer.optim_step(STEP).result(timeout=SECONDS).metrics["grad_norm"] > 0
    after = trainer.forward(data, "importance_sampling").result(timeout=SECONDS)
    assert after.loss < before.loss
    newer = publish(trainer, "policy")
    again = newer.sample(ModelInput.from_ints(PROMPT), 1, SAMPLING)
    assert again.policy_version > answer.policy_version
    for one in (sampler, newer):
        one.close()


async def test_the_loop_learns(trainer):
    """Twelve steps with concurrent rollouts, all from coroutines, raise the mean reward."""
    means = []
    for _ in range(12):
        sampler = await trainer.save_weights_and_get_sampling_client_async("policy")
        answers = await asyncio.gather(
            *(sampler.sample_async(ModelInput.from_ints(PROMPT), 2, SAMPLING) for _ in range(GROUP))
        )
        data, mean = experience([one for answer in answers for one in answer.sequences])
        means.append(mean)
        passed = await trainer.forward_backward_async(data, "importance_sampling")
        stepped = await trainer.optim_step_async(STEP)
        await asyncio.gather(passed.result_async(), stepped.result_async())
        await sampler.aclose()
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.1, means
