"""A loss of your own: GSPO, which clips the ratio of whole completions, in ten lines of torch.

    python examples/rl_custom_loss.py --model tg-tinker/smollm2-135m    # without --model: a tiny random one

This program computes the loss from the logprobs, and the server takes its gradient back through the model. GSPO is
group sequence policy optimisation: Zheng et al. 2025, arXiv:2507.18071. The model learns to write digits; the mean
reward is plotted to examples/output/rl_custom_loss.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from tg_tinker.loops import AdamParams, Datum, ModelInput, SampleResponse, SamplingParams, ServiceClient, TensorData

PROMPTS = ("My favourite number is", "One two three", "The year is", "Call me at")
SAMPLES, PARAMS = 24, SamplingParams(max_tokens=12)  # completions of each prompt
PASSES, LOW, HIGH = 2, 0.9, 1.1  # steps on the same samples; a completion's ratio is clipped to this range


def gspo(data: Sequence[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """-mean min(s A, clip(s) A) over completions, s the geometric mean of their tokens' ratios."""
    inputs = [{name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()} for datum in data]
    advantages = torch.tensor([float(one["advantages"][-1]) for one in inputs])
    drifts = [now - torch.from_numpy(one["logprobs"]) for now, one in zip(logprobs, inputs, strict=True)]
    own = [torch.from_numpy(one["mask"]) > 0 for one in inputs]  # the completion's tokens, without the prompt's
    ratio = torch.stack([drift[tokens].mean() for drift, tokens in zip(drifts, own, strict=True)]).exp()
    clipped = ratio.clamp(LOW, HIGH)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean(), {
        "clipped": (ratio != clipped).float().mean().item()
    }


def reward(text: str) -> float:
    """The share of the characters that are digits; a very short completion earns little."""
    return sum("0" <= character <= "9" for character in text) / max(len(text), 12)


def data_of(prompt: list[int], response: SampleResponse, rewards: np.ndarray) -> list[Datum]:
    """A group of completions; what only the loss reads is kept beside the targets, and stays in this program."""
    silent, data = [0.0] * (len(prompt) - 1), []
    for sequence, advantage in zip(response.sequences, rewards - rewards.mean(), strict=True):
        tokens, ones = [*prompt, *sequence.tokens], np.ones(len(sequence.tokens))
        own = {"logprobs": sequence.logprobs or (), "advantages": advantage * ones, "mask": ones}
        inputs = {name: TensorData(np.array([*silent, *values], np.float32)) for name, values in own.items()}
        inputs["target_tokens"] = TensorData(tokens[1:], "int64")
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data


def train(model: str, steps: int) -> list[float]:
    """Run the loop; return the mean reward of each step."""
    curve = []
    with ServiceClient() as service:
        trainer = service.create_lora_training_client(base_model=model, rank=16)
        prompts = [trainer.get_tokenizer().encode(prompt) for prompt in PROMPTS]
        for step in range(steps):
            sampler = trainer.save_weights_and_get_sampling_client("newest").result()
            groups = [sampler.sample(prompt, SAMPLES, PARAMS) for prompt in prompts]
            rewards = np.array([[reward(one.text or "") for one in group.sequences] for group in groups])
            parts = zip(prompts, groups, rewards, strict=True)
            data, outputs = [datum for part in parts for datum in data_of(*part)], []
            for _ in range(PASSES):
                passed = trainer.forward_backward_custom(data, gspo)
                trainer.optim_step(AdamParams(learning_rate=2e-3)).result()
                outputs.append(passed.result())
            curve.append(float(rewards.mean()))
            clipped = outputs[-1].metrics["clipped"]
            print(f"step {step:2}  mean reward {curve[-1]:.3f}  clipped {clipped:.2f}", flush=True)
    return curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tg-tinker/tiny")
    parser.add_argument("--steps", type=int, default=10)
    rewards_by_step = train(**vars(parser.parse_args()))
    print(f"mean reward {rewards_by_step[0]:.2f} -> {rewards_by_step[-1]:.2f}")
    if find_spec("matplotlib") is not None:
        from matplotlib.figure import Figure

        figure, folder = Figure(), Path(__file__).parent / "output"
        figure.add_subplot(xlabel="step", ylabel="mean reward of a step's samples").plot(rewards_by_step, marker="o")
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / "rl_custom_loss.png")
