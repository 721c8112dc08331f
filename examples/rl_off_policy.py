"""Reinforcement learning that never stops sampling: rollouts go on while the trainer works, a few versions behind.

    python examples/rl_off_policy.py --model tg-tinker/smollm2-135m    # without --model: a tiny random one

One task for each prompt keeps sampling from the newest published weights. The trainer takes whatever is ready, drops
what is more than MOST_LAG versions old, and steps with CISPO, which corrects for the lag.
"""

from __future__ import annotations

import argparse
import asyncio
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tg_tinker.loops import AdamParams, Datum, ModelInput, SampleResponse, SamplingParams, ServiceClient, TensorData

PROMPTS = ("HELLO ", "ONCE UPON A TIME ", "THE WEATHER IS ", "MY FOOD ")
SAMPLES, PARAMS = 16, SamplingParams(max_tokens=12)  # completions of a prompt at once
MOST_LAG, CLIP = 2, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}  # in versions; as in CISPO's paper


def reward(text: str) -> float:
    """The share of the characters that are lower-case letters; a very short completion earns little."""
    return sum("a" <= character <= "z" for character in text) / max(len(text), 12)


def data_of(prompt: list[int], response: SampleResponse) -> tuple[list[Datum], float]:
    """A group of completions with the group's mean reward; each has its advantage over the group on its own tokens."""
    rewards = np.array([reward(sequence.text or "") for sequence in response.sequences])
    silent, data = [0.0] * (len(prompt) - 1), []
    for sequence, advantage in zip(response.sequences, rewards - rewards.mean(), strict=True):
        tokens, advantages = [*prompt, *sequence.tokens], [float(advantage)] * len(sequence.tokens)
        known = {"logprobs": sequence.logprobs or (), "advantages": advantages}  # under the version that sampled
        inputs = {name: TensorData([*silent, *values]) for name, values in known.items()}
        inputs["target_tokens"] = TensorData(tokens[1:], "int64")
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data, float(rewards.mean())


async def train(model: str, steps: int) -> list[float]:
    """Run both sides; return the mean reward of each step."""
    curve = []
    ready: asyncio.Queue[tuple[list[int], SampleResponse]] = asyncio.Queue(len(PROMPTS))  # full: the samplers wait
    async with ServiceClient() as service, asyncio.TaskGroup() as group:
        trainer = await service.create_lora_training_client_async(base_model=model, rank=16)
        newest = await trainer.save_weights_and_get_sampling_client_async("newest")

        async def roll_out(prompt: list[int]) -> None:
            while True:
                await ready.put((prompt, await newest.sample_async(prompt, SAMPLES, PARAMS)))

        tokenizer = await trainer.get_tokenizer_async()
        actors = [group.create_task(roll_out(tokenizer.encode(prompt))) for prompt in PROMPTS]
        for step in range(steps):
            data: list[Datum] = []
            seen: list[tuple[float, int]] = []  # of each group: its mean reward, its lag
            while len(seen) < len(PROMPTS):
                prompt, response = await ready.get()
                lag = step + 1 - (response.policy_version or 0)  # each step publishes a version
                if lag <= MOST_LAG:
                    more, mean = data_of(prompt, response)
                    data, seen = data + more, [*seen, (mean, lag)]
            passed = await trainer.forward_backward_async(data, "cispo", CLIP)
            stepped = await trainer.optim_step_async(AdamParams(learning_rate=2e-3))
            newest = await trainer.save_weights_and_get_sampling_client_async("newest")
            ratio = (await asyncio.gather(passed, stepped))[0].metrics["ratio_mean"]
            mean, lag = np.mean(seen, axis=0)
            print(f"step {step:2}  mean reward {mean:.3f}  lag {lag:.1f}  ratio {ratio:.2f}", flush=True)
            curve.append(float(mean))
        for actor in actors:
            actor.cancel()
    return curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tg-tinker/tiny")
    parser.add_argument("--steps", type=int, default=15)
    rewards_by_step = asyncio.run(train(**vars(parser.parse_args())))
    print(f"mean reward {rewards_by_step[0]:.2f} -> {rewards_by_step[-1]:.2f}")
    if find_spec("matplotlib") is not None:
        from matplotlib.figure import Figure

        figure, folder = Figure(), Path(__file__).parent / "output"
        figure.add_subplot(xlabel="step", ylabel="mean reward of a step's samples").plot(rewards_by_step, marker="o")
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / "rl_off_policy.png")
