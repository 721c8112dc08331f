"""Supervised fine-tuning as a plain script: read questions and answers, train, ask, save.

    python examples/sft_blocking.py                           # a real model: tg-tinker models fetch smollm2-135m
    python examples/sft_blocking.py --model tg-tinker/tiny    # random weights: quick, and learns next to nothing

Put your own questions and answers into a file like examples/data/marrowick_train.jsonl and pass it as --data.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tg_tinker.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient

DATA = Path(__file__).parent / "data"


def read(path: Path) -> list[dict[str, str]]:
    """Read a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt(question: str) -> str:
    """Write a question in the form in which the model learns to answer it."""
    return f"Question: {question}\nAnswer:"


def main() -> None:
    """Train on every question, then ask the held-back ones."""
    parser = argparse.ArgumentParser(description="Fine-tune a model on questions and answers.")
    parser.add_argument("--model", default="tg-tinker/smollm2-135m")
    parser.add_argument("--data", type=Path, default=DATA / "marrowick_train.jsonl")
    parser.add_argument("--ask", type=Path, default=DATA / "marrowick_held_back.jsonl")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    options = parser.parse_args()

    with ServiceClient() as service:
        tc = service.create_lora_training_client(options.model, rank=16)
        tokenizer = tc.get_tokenizer()
        data = [
            Datum.from_prompt_answer(tokenizer, prompt(row["question"]), f" {row['answer']}")
            for row in read(options.data)
        ]

        steps = options.epochs * -(-len(data) // options.batch_size)
        step = 0
        for epoch in range(options.epochs):
            random.Random(epoch).shuffle(data)  # noqa: S311 - an order is no secret
            for start in range(0, len(data), options.batch_size):
                rate = options.learning_rate * (1 - step / steps)
                # Both are submitted before waiting for either, so the server is never idle between them.
                gradients = tc.forward_backward(data[start : start + options.batch_size])
                update = tc.optim_step(AdamParams(learning_rate=rate))
                update.result()
                step += 1
            print(f"epoch {epoch + 1} of {options.epochs}: step {step}, loss {gradients.result().loss:.4f}")

        sampler = tc.save_weights_and_get_sampling_client("trained").result()
        params = SamplingParams(max_tokens=20, temperature=0.0, stop="\n")
        for row in read(options.ask):
            asked = ModelInput.from_ints(tokenizer.encode(prompt(row["question"])))
            answer = sampler.sample(asked, 1, params).sequences[0].text or ""
            right = "right" if row["expect"].casefold() in answer.casefold() else "wrong"
            print(f"{right}: {row['question']} {answer.strip()}")

        saved = tc.save_state("trained").result()
        print(f"saved as {saved.path}")


if __name__ == "__main__":
    main()
