"""Direct preference optimisation: a model learns from pairs which of two answers is preferred, without a reward.

    python examples/rl_dpo.py --model tg-tinker/smollm2-135m    # without --model: a tiny random one

The reference is the base model: a sampler scores both answers with it once, before the training. The margin says, in
nats, how much more strongly than the reference the trained model prefers the right answer. Two prompts are held back,
to see whether that carries over. The margin is plotted to examples/output/rl_dpo.png.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import attrs
import numpy as np

from tg_tinker.loops import AdamParams, Datum, ForwardBackwardOutput, SamplingClient, ServiceClient, TensorData

PREFERRED, REJECTED = " With pleasure, one moment.", " Do it yourself."
PROMPTS = (
    *("Could you help me?", "Please carry this.", "What is the time?", "Open the window.", "Tell me a story."),
    *("Where is the station?", "Lend me your pen.", "Call a taxi."),
)
HELD_BACK = 2  # prompts


def scored(datum: Datum, reference: SamplingClient) -> Datum:
    """The datum as DPO wants it: its answer weighs 1, its prompt 0, and it carries the reference's logprobs."""
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    tokens = datum.model_input.append_int(int(targets[-1]))
    known = np.array(reference.compute_logprobs(tokens)[1:], np.float32)  # position i predicts token i + 1
    more = {"weights": TensorData((targets != -100).astype(np.float32)), "ref_logprobs": TensorData(known)}
    return attrs.evolve(datum, loss_fn_inputs={**datum.loss_fn_inputs, **more})


def margins(data: list[Datum], output: ForwardBackwardOutput) -> list[float]:
    """By how many nats each pair's preferred answer has gained on the rejected one."""
    gains = []
    for datum, seen in zip(data, output.loss_fn_outputs, strict=True):
        inputs = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}
        gains.append(float((inputs["weights"] * (seen["logprobs"].to_numpy() - inputs["ref_logprobs"])).sum()))
    return [preferred - rejected for preferred, rejected in zip(gains[0::2], gains[1::2], strict=True)]


def train(model: str, steps: int, learning_rate: float) -> tuple[list[float], list[float]]:
    """Run the loop; return the mean margin of each step, and the margins of the pairs held back."""
    curve = []
    with ServiceClient() as service:
        trainer = service.create_lora_training_client(base_model=model, rank=16)
        tokenizer, reference = trainer.get_tokenizer(), service.create_sampling_client(base_model=model)
        pairs = [(prompt, answer) for prompt in PROMPTS for answer in (PREFERRED, REJECTED)]  # they alternate
        data = [scored(Datum.from_prompt_answer(tokenizer, *pair), reference) for pair in pairs]
        data, held_back = data[: -2 * HELD_BACK], data[-2 * HELD_BACK :]
        for step in range(steps):
            passed = trainer.forward_backward(data, "dpo", {"beta": 0.1})
            stepped = trainer.optim_step(AdamParams(learning_rate=learning_rate))
            output = passed.result()
            curve.append(float(np.mean(margins(data, output))))
            print(f"step {step:2}  loss {output.loss:.3f}  mean margin {curve[-1]:7.2f} nats", flush=True)
            stepped.result()
        return curve, margins(held_back, trainer.forward(held_back, "dpo").result())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tg-tinker/tiny")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    given = parser.parse_args()
    curve, unseen = train(given.model, given.steps, given.learning_rate)
    print(f"mean margin {curve[0]:.2f} -> {curve[-1]:.2f}, held back {', '.join(f'{margin:.2f}' for margin in unseen)}")
    if find_spec("matplotlib") is not None:
        from matplotlib.figure import Figure

        figure, folder = Figure(), Path(__file__).parent / "output"
        figure.add_subplot(xlabel="step", ylabel="mean margin, nats").plot(curve, marker="o")
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / "rl_dpo.png")
