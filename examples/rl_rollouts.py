"""Reinforcement learning in one loop: a model learns to SHOUT, from nothing but a reward.

    python examples/rl_rollouts.py                                   # a tiny random model, a minute on one core
    python examples/rl_rollouts.py --model tg-tinker/smollm2-135m    # a real one: tg-tinker models fetch smollm2-135m

Each step publishes the weights, samples 64 completions at once from exactly those weights, scores them, and takes one
step of importance-sampled policy gradient. The mean reward is plotted to examples/output/rl_rollouts.png.
"""

from __future__ import annotations

import argparse
import asyncio
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tg_tinker import AdamParams, Datum, ModelInput, SamplingClient, SamplingParams, ServiceClient, TensorData
from tg_tinker.loops import SampledSequence

PROMPTS = ("Once upon a time", "The weather today is", "My favourite food is", "In the morning I")
SAMPLES = 16  # of each prompt: 64 completions a step
PARAMS = SamplingParams(max_tokens=16, temperature=1.0)


def reward(text: str) -> float:
    """The share of the visible characters that are capital letters; a very short completion earns little."""
    visible = "".join(text.split())
    return sum("A" <= character <= "Z" for character in visible) / max(len(visible), PARAMS.max_tokens or 1)


async def rollouts(sampler: SamplingClient, prompt: list[int]) -> list[SampledSequence]:
    """Sample completions of one prompt; each is a request of its own, and all are under way at once."""
    asked = (sampler.sample_async(ModelInput.from_ints(prompt), 1, PARAMS) for _ in range(SAMPLES))
    return [response.sequences[0] for response in await asyncio.gather(*asked)]


def datum(prompt: list[int], sequence: SampledSequence, advantage: float) -> Datum:
    """Position i predicts token i + 1; the prompt's own tokens get no advantage, and therefore no gradient."""
    tokens, silent = [*prompt, *sequence.tokens], [0.0] * (len(prompt) - 1)
    inputs = {
        "target_tokens": TensorData(tokens[1:], "int64"),
        "logprobs": TensorData([*silent, *(sequence.logprobs or ())]),
        "advantages": TensorData([*silent, *[advantage] * len(sequence.tokens)]),
    }
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


async def train(model: str, steps: int, learning_rate: float) -> list[float]:
    """Run the loop; return the mean reward of each step."""
    curve = []
    async with ServiceClient() as service:
        trainer = await service.create_lora_training_client_async(base_model=model, rank=16)
        tokenizer = await trainer.get_tokenizer_async()
        prompts = [tokenizer.encode(text) for text in PROMPTS]
        for step in range(steps):
            sampler = await trainer.save_weights_and_get_sampling_client_async(name=f"step-{step}")
            groups = await asyncio.gather(*(rollouts(sampler, prompt) for prompt in prompts))
            rewards = np.array([[reward(one.text or "") for one in group] for group in groups])
            advantages = rewards - rewards.mean(axis=1, keepdims=True)  # better or worse than the group
            data = [
                datum(prompt, sequence, float(advantage))
                for prompt, group, row in zip(prompts, groups, advantages, strict=True)
                for sequence, advantage in zip(group, row, strict=True)
            ]
            # Both are accepted, in this order, before the first result is awaited: the server never waits for us.
            passed = await trainer.forward_backward_async(data, "importance_sampling")
            stepped = await trainer.optim_step_async(AdamParams(learning_rate=learning_rate))
            await asyncio.gather(passed, stepped)
            curve.append(float(rewards.mean()))
            print(f"step {step:2}  mean reward {curve[-1]:.3f}  {groups[0][0].text!r}", flush=True)
    return curve


def draw(curve: list[float], picture: Path) -> None:
    """Plot the curve, if matplotlib is installed."""
    if find_spec("matplotlib") is None:
        print("no picture: pip install matplotlib")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="mean reward of 64 samples", ylim=(0, 1.03))
    axes.plot(curve, marker="o")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=120)
    print(f"the curve is in {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tg-tinker/tiny")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    given = parser.parse_args()
    rewards_by_step = asyncio.run(train(given.model, given.steps, given.learning_rate))
    print(f"mean reward {rewards_by_step[0]:.2f} -> {rewards_by_step[-1]:.2f}")
    draw(rewards_by_step, Path(__file__).parent / "output" / "rl_rollouts.png")
