"""A loss of one's own, between the forward pass that another trainer answers and the weights that go back to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tg_tinker.errors import ServerError
from tg_tinker.loops import Datum, ForwardBackwardOutput, ModelInput, TensorData
from tg_tinker.loops.custom import evaluate

DATA = [Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": TensorData([2, 3, -100], "int64")})]
ACKNOWLEDGED = {"skip_token_normalization": 1.0}


def seen(logprobs: list[float | None], metrics: dict[str, float]) -> ForwardBackwardOutput:
    """The answer to a forward pass over ``DATA``."""
    return ForwardBackwardOutput(loss_fn_outputs=({"logprobs": TensorData(logprobs)},), metrics=metrics)


def doubled(_: object, logprobs: list[Any]) -> tuple[float, list[Any], dict[str, float]]:
    """Twice the sum of what was seen."""
    return 2.0 * float(logprobs[0].sum()), [np.full_like(logprobs[0], 2.0)], {}


async def test_what_is_ignored_is_nothing_to_the_loss() -> None:
    """A trainer that answers null where there is no target gives a finite loss, and no weight there."""
    weighted, loss, _ = await evaluate(DATA, doubled, "numpy", seen([-1.0, -2.0, None], ACKNOWLEDGED))
    assert loss == -6.0
    assert weighted[0].loss_fn_inputs["weights"].tolist() == [-2.0, -2.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (seen([-1.0, -2.0, 0.0], {}), "leaves sums undivided"),
        (ForwardBackwardOutput(metrics=ACKNOWLEDGED), "0 of 1 datums"),
        (seen([-1.0, -2.0], ACKNOWLEDGED), "shape"),
    ],
)
async def test_an_answer_that_would_train_wrongly_is_refused(answer: ForwardBackwardOutput, said: str) -> None:
    """Without the acknowledgement the gradient would be divided; without all logprobs there is none."""
    with pytest.raises(ServerError, match=said) as caught:
        await evaluate(DATA, doubled, "numpy", answer)
    assert caught.value.code == "BAD_ANSWER"
