"""Trackers: one record per optimizer step, however its results arrive, and never at the training's cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.loops import Tracker, WandbConfig, WandbTracker
from tg_tinker.loops.tracking import Progress, tracker_of
from tg_tinker.types.loops_results import ForwardBackwardOutput, OptimStepResponse


class Listed:
    """A tracker that keeps what it is told."""

    def __init__(self, *, broken: bool = False) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.broken = broken

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.records.append((step, dict(metrics)))
        if self.broken:
            raise OSError("the disk is full")

    def finish(self) -> None:
        self.finished += 1


def output(loss: float, tokens: float, **metrics: float) -> ForwardBackwardOutput:
    """A pass over so many tokens."""
    return ForwardBackwardOutput(loss=loss, metrics={"loss": loss, "num_tokens": tokens, **metrics})


def stepped(step: int, **metrics: float) -> OptimStepResponse:
    """An optimizer step."""
    known = {"step": float(step), "learning_rate": 1e-3, "lr": 1e-3, "grad_norm": 2.0}
    return OptimStepResponse(metrics={**known, **metrics})


def test_a_step_is_one_record_of_all_its_passes():
    """The loss is the mean over the tokens of every pass; rate, norm and ε come from the step."""
    tracker = Listed()
    progress = Progress(tracker)
    first, second, step = progress.expect_pass(), progress.expect_pass(), progress.expect_step()
    first(output(1.0, 30.0, ratio_mean=1.0))
    second(output(2.0, 10.0, ratio_mean=2.0))
    step(stepped(1, epsilon=0.5))
    progress.finish()
    ((number, record),) = tracker.records
    assert number == 1
    assert record.pop("tokens_per_second") > 0.0
    assert record == {
        "loss": 1.25, "num_tokens": 40.0, "ratio_mean": 1.25, "learning_rate": 1e-3, "grad_norm": 2.0, "epsilon": 0.5
    }  # fmt: skip


def test_results_may_arrive_in_any_order():
    """A step whose result comes before that of its passes waits for them, and for those of no other step."""
    tracker = Listed()
    progress = Progress(tracker)
    first, step = progress.expect_pass(), progress.expect_step()
    second, later = progress.expect_pass(), progress.expect_step()
    step(stepped(1))
    second(output(2.0, 1.0))
    later(stepped(2))
    first(output(1.0, 1.0))
    progress.finish()
    assert [(number, record["loss"]) for number, record in tracker.records] == [(2, 2.0), (1, 1.0)]


def test_passes_that_failed_hold_no_record_back():
    """What was submitted for a step that was refused is forgotten with it."""
    tracker = Listed()
    progress = Progress(tracker)
    progress.expect_pass()  # it failed, and so did its step: neither has a result
    progress.expect_step()
    passed, step = progress.expect_pass(), progress.expect_step()
    passed(output(1.0, 1.0))
    step(stepped(1))
    progress.finish()
    assert [number for number, _ in tracker.records] == [1]


def test_losses_that_are_sums_add_up():
    """With skip_token_normalization, as custom losses are, the record's loss is the sum of the passes' losses."""
    tracker = Listed()
    progress = Progress(tracker)
    for tell, loss in ((progress.expect_pass(), 3.0), (progress.expect_pass(), 4.0)):
        tell(output(loss, 10.0, skip_token_normalization=1.0))
    progress.expect_step()(stepped(1))
    progress.finish()
    assert tracker.records[0][1]["loss"] == 7.0


def test_a_broken_tracker_does_not_stop_the_training(caplog):
    """Its error is logged, and it is told the next record and the end all the same; the end only once."""
    tracker = Listed(broken=True)
    progress = Progress(tracker)
    for number in (1, 2):
        progress.expect_step()(stepped(number))
    progress.finish()
    progress.finish()
    assert [number for number, _ in tracker.records] == [1, 2]
    assert tracker.finished == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_what_may_be_given_as_a_tracker():
    """Anything with the two methods; not both kinds, and nothing that only looks like one."""
    tracker = Listed()
    assert isinstance(tracker, Tracker)
    assert tracker_of(None, tracker) is tracker
    assert tracker_of(None, None) is None
    for wandb_config, other, field in (
        (None, object(), "tracker"), ({"project": "p"}, None, "wandb_config"), (WandbConfig("p"), tracker, "tracker")
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError) as caught:
            tracker_of(wandb_config, other)
        assert caught.value.field == field
    with pytest.raises(InvalidRequestError):
        WandbConfig("")


def test_the_wandb_extra_is_asked_for(monkeypatch):
    """Without the package the error says what to install."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InvalidRequestError, match=r"tg-tinker\[wandb\]") as caught:
        WandbTracker(WandbConfig("p"))
    assert caught.value.code == "EXTRA_MISSING"


def test_wandb_gets_project_name_records_and_the_end(monkeypatch):
    """The run is W&B's own: opened with project and name, logged to with the step, finished."""
    calls: list[object] = []
    run = SimpleNamespace(
        log=lambda metrics, step: calls.append((metrics, step)), finish=lambda: calls.append("finished")
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: calls.append(given) or run))
    tracker = tracker_of(WandbConfig("p", name="n"), None)
    assert tracker is not None
    tracker.log({"loss": 1.0}, 3)
    tracker.finish()
    assert calls == [{"project": "p", "name": "n"}, ({"loss": 1.0}, 3), "finished"]
