"""Fine-tuning with differential privacy: train until the budget is spent, stop cleanly, save, plot what it cost.

    python examples/private_finetune.py                                   # a tiny random model, under a minute
    python examples/private_finetune.py --model tg-tinker/smollm2-135m    # a real one; fetch it as below

What is protected is one line of the data: whoever gets the weights can hardly tell whether it was there. Forty-eight
lines are few for that, so the loss falls only a little. Among thousands of lines each one matters less, and the same ε
buys far more. The ε spent, step by step, is plotted to examples/output/private_finetune.png.
`tg-tinker models fetch smollm2-135m` fetches the real model.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from tg_tinker import (
    BatchData,
    DPBudgetExceededError,
    DPConfig,
    DPMetrics,
    LoRAConfig,
    OptimizerConfig,
    PoissonSampler,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)

DATA = Path(__file__).parent / "data"
DELTA = 1e-3  # must be well below 1 / number of lines


def read(path: Path) -> list[str]:
    """Read questions and answers as texts; the same line twice would count for two, so it is dropped."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows))


def config(model: str, lines: int, batch: int, epsilon: float) -> TrainingConfig:
    """Describe a private run; ``dataset_size`` promises that batches are drawn by Poisson sampling."""
    return TrainingConfig(
        model_ref=model,
        lora_config=LoRAConfig(rank=4, dropout=0.0, target_modules=("q_proj", "v_proj")),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.5, momentum=0.5),
        dp_config=DPConfig(
            noise_multiplier=1.0,
            max_grad_norm=0.5,
            target_epsilon=epsilon,
            target_delta=DELTA,
            expected_batch_size=batch,
            dataset_size=lines,
        ),
    )


def train(tc: TrainingClient, texts: list[str], batch: int) -> list[DPMetrics]:
    """Step until the budget is spent; return what each step cost."""
    tokenizer = tc.get_tokenizer()
    spent: list[DPMetrics] = []
    for drawn in PoissonSampler(len(texts), batch / len(texts)):
        try:
            # An empty draw is a step too: skipping it would reveal that it was empty.
            if drawn:
                tc.forward_backward(BatchData.from_texts(tokenizer, [texts[index] for index in drawn])).result()
            step = tc.optim_step().result()
        except DPBudgetExceededError as error:
            print(f"stopped, and nothing was changed: {error}")
            break
        assert step.dp_metrics is not None
        spent.append(step.dp_metrics)
        if step.step % 5 == 1:
            clipped = f"{step.dp_metrics.num_clipped} of {len(drawn)} clipped"
            print(f"step {step.step:3}  epsilon {step.dp_metrics.total_epsilon:.3f}  {clipped}", flush=True)
    return spent


def loss_of(tc: TrainingClient, texts: list[str]) -> float:
    """Compute the loss without training and without spending privacy."""
    tc.eval()
    loss = tc.forward_backward(BatchData.from_texts(tc.get_tokenizer(), texts)).result().loss
    tc.train()
    return loss


def draw(spent: list[DPMetrics], budget: float, picture: Path) -> None:
    """Plot ε over the steps, if matplotlib is installed."""
    if find_spec("matplotlib") is None:
        print("no picture: pip install matplotlib")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="step", ylabel=f"ε at δ = {DELTA:g}")
    axes.plot(range(1, len(spent) + 1), [metrics.total_epsilon or 0.0 for metrics in spent], marker=".")
    axes.axhline(budget, linestyle="--", color="grey", label="budget")
    axes.legend()
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=120)
    print(f"the curve is in {picture}")


def main() -> None:
    """Train privately until the budget is spent, then show that saving and evaluating still work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tg-tinker/tiny")
    parser.add_argument("--data", type=Path, default=DATA / "marrowick_train.jsonl")
    parser.add_argument("--epsilon", type=float, default=6.0, help="the budget")
    parser.add_argument("--batch-size", type=int, default=8, help="expected; the real size varies from step to step")
    options = parser.parse_args()

    texts = read(options.data)
    with ServiceClient() as service:
        tc = service.create_training_client(config(options.model, len(texts), options.batch_size, options.epsilon))
        before = loss_of(tc, texts)
        spent = train(tc, texts, options.batch_size)
        report = tc.get_privacy_report()
        saved = tc.save_state(metadata={"trained": "privately"})
        print(f"{report.steps} steps at epsilon {report.total_epsilon:.3f} of {options.epsilon:g}, per {report.unit}")
        print(f"loss {before:.3f} -> {loss_of(tc, texts):.3f}; saved as {saved.artifact_id}")
    draw(spent, options.epsilon, Path(__file__).parent / "output" / "private_finetune.png")


if __name__ == "__main__":
    main()
