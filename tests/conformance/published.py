"""What the checks say to the published client again and again, whichever of its versions is installed."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from baseten.loops import AdamParams, Datum, ModelInput, TensorData

TINY = "tg-tinker/tiny"
PROMPT = [
    72,
    101,
    108,
    108,
    111,
    44,
]  # long: that client cuts off a completion's repetition of its prompt
TEXTS = ([84, 104, 101, 32, 98, 111, 120], [79, 110, 101, 32, 116, 119, 111, 32, 116, 104, 114, 101, 101])
STEP = AdamParams(learning_rate=4e-3)
SECONDS = 60.0  # that an answer may take; far below the hour for which that client tries again


def version() -> tuple[int, ...]:
    """The version of the published client."""
    return tuple(int(part) for part in metadata.version("baseten-loops").split("."))


def kinds_saved() -> int:
    """How many checkpoints a ``save_state`` makes: older clients have runs with a sampler, to which it publishes."""
    return 2 if version() < (0, 14) else 1


def tensor(values: list[Any], dtype: str = "float32") -> TensorData:
    """A tensor of one dimension."""
    return TensorData(data=values, dtype=dtype, shape=[len(values)])


def datum(tokens: list[int], masked: int = 0, **inputs: list[float]) -> Datum:
    """A datum whose position i predicts token i + 1; the first ``masked`` positions count for nothing."""
    targets = [-100] * masked + tokens[masked + 1 :]
    tensors = {"target_tokens": tensor(targets, "int64")} | {name: tensor(values) for name, values in inputs.items()}
    return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=tensors)


def lesson() -> list[Datum]:
    """Two texts to learn, of different lengths."""
    return [datum(text) for text in TEXTS]


def rollout(prompt: list[int], sampled: list[int], logprobs: list[float], advantage: float) -> Datum:
    """What a sample says to a policy gradient: nothing about its prompt, one advantage for all that was sampled."""
    before = len(prompt) - 1
    return datum(
        prompt + sampled,
        masked=before,
        logprobs=[0.0] * before + logprobs,
        advantages=[0.0] * before + [advantage] * len(sampled),
    )


def active(one: Datum, values: list[float]) -> list[float]:
    """The values where the datum has a target."""
    targets = one.loss_fn_inputs["target_tokens"].data
    assert len(values) == len(targets)
    return [value for value, target in zip(values, targets, strict=True) if target != -100]


def logprobs(output: Any) -> list[list[float]]:
    """The log-probabilities of a pass, a list for each datum."""
    return [one["logprobs"].data for one in output.loss_fn_outputs]


def learn(trainer: Any, steps: int = 1) -> list[float]:
    """Take steps of cross entropy on the lesson; gives the loss before each."""
    losses = []
    for _ in range(steps):
        passed, stepped = trainer.forward_backward(lesson(), "cross_entropy"), trainer.optim_step(STEP)
        losses.append(passed.result(timeout=SECONDS).loss)
        stepped.result(timeout=SECONDS)
    return losses


def publish(trainer: Any, name: str) -> Any:
    """A sampling client of what is published now: a future gave it until 0.8, and gives it no more."""
    made = trainer.save_weights_and_get_sampling_client(name)
    return made.result(timeout=SECONDS) if hasattr(made, "result") else made
