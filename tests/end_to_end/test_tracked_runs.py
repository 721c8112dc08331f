"""A tracker hears of every optimizer step of a real run, whatever face was used and whoever waited."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import pytest
from fixtures.programs import MODEL, datum

from tg_tinker import AdamParams, InvalidRequestError, ServiceClient, loops

pytestmark = pytest.mark.timeout(240)


class Listed:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.records: dict[int, dict[str, float]] = {}
        self.finished = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.records[step] = dict(metrics)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def listed() -> Listed:
    """The tracker of ``tracked``."""
    return Listed()


@pytest.fixture
def tracked(trainer: loops.TrainingClient, listed: Listed) -> Iterator[loops.TrainingClient]:
    """A client of a new run that tells ``listed``."""
    trainer.track(listed)
    yield trainer
    trainer.close()


def twice_as_likely(_, logprobs):
    """A loss of one's own, with numpy."""
    return 2.0, [-2.0 * (one < 0) for one in logprobs], {"mine": 5.0}


def test_every_face_is_heard_of(tracked, listed):
    """Blocking, unwaited, custom: a record each, with loss, rate, norm and tokens/s; close finishes the tracker."""
    first = tracked.forward_backward([datum()]).result()
    tracked.optim_step(AdamParams(learning_rate=1e-3)).result()
    tracked.forward_backward([datum(), datum()])  # nobody waits for this one
    tracked.optim_step(AdamParams(learning_rate=2e-3))
    tracked.forward_backward_custom([datum()], twice_as_likely, loss_type_input="numpy")
    tracked.optim_step(AdamParams(learning_rate=3e-3)).result()
    while 2 not in listed.records:
        time.sleep(0.01)
    tracked.close()
    assert listed.finished
    assert [listed.records[step]["learning_rate"] for step in (1, 2, 3)] == [1e-3, 2e-3, 3e-3]
    assert listed.records[1]["loss"] == pytest.approx(first.loss)
    assert listed.records[2]["num_tokens"] == 8.0
    assert (listed.records[3]["loss"], listed.records[3]["mine"]) == (2.0, 5.0)
    assert all(record["grad_norm"] > 0 and record["tokens_per_second"] > 0 for record in listed.records.values())


async def test_coroutines_are_heard_of(tracked, listed):
    """The asynchronous face reports as the blocking one does; aclose finishes the tracker."""
    passed = await tracked.forward_backward_async([datum()])
    stepped = await tracked.optim_step_async(AdamParams())
    await stepped
    await passed
    await tracked.aclose()
    assert listed.finished
    assert list(listed.records) == [1]


def test_a_client_has_one_tracker(tracked):
    """A second one is refused, and so is what is none."""
    for wrong in (Listed(), None, "wandb"):
        with pytest.raises(InvalidRequestError) as caught:
            tracked.track(wrong)
        assert caught.value.field == "tracker"


def test_a_tracker_is_given_at_creation(service: ServiceClient, listed: Listed) -> None:
    """``create_lora_training_client(tracker=...)`` tracks from the first step; what is no tracker is refused."""
    client = service.create_lora_training_client(MODEL, rank=2, tracker=listed)
    client.forward_backward([datum()]).result()
    client.optim_step(AdamParams()).result()
    assert list(listed.records) == [1]
    client.close()
    assert listed.finished
    with pytest.raises(InvalidRequestError) as refused:
        service.create_lora_training_client(MODEL, rank=2, tracker=3)  # type: ignore[arg-type]
    assert refused.value.field == "tracker"
