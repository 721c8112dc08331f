"""`tg-tinker clients` and `futures`: what a running server holds, and what it did."""

from __future__ import annotations

import pytest
from fixtures.programs import BATCH, tg_config

from tg_tinker import DPConfig, InvalidRequestError, ServiceClient, TrainingClient

pytestmark = pytest.mark.timeout(240)


def test_a_run_is_listed_shown_and_removed(tg, service: ServiceClient) -> None:
    """A private run appears with its step and ε, tells its configuration and budget, and is gone when removed."""
    run = service.create_training_client(tg_config(dp_config=DPConfig(target_epsilon=20.0)))
    run.forward_backward(BATCH).result()
    spent = run.optim_step().result().dp_metrics
    assert spent is not None
    listed = {one["training_client_id"]: one for one in tg.json("clients", "ls")}[run.id]
    assert (listed["step"], listed["status"]) == (1, "active")
    assert f"{spent.total_epsilon:.3g}" in next(
        line for line in tg("clients", "ls").stdout.splitlines() if run.id in line
    )
    shown = tg.json("clients", "show", run.id)
    assert shown["config"]["model_ref"] == "tg-tinker/tiny"
    assert shown["privacy"]["total_epsilon"] == spent.total_epsilon
    assert shown["privacy"]["target_epsilon"] == 20.0
    assert tg("clients", "rm", run.id, "--yes").stdout == f"{run.id} is deleted\n"
    assert "no such training client" in tg("clients", "show", run.id, code=1).stderr


def test_removal_asks_first(tg, tc: TrainingClient) -> None:
    """Without --yes nothing is deleted before somebody says so."""
    assert "Delete" in tg("clients", "rm", tc.id, code=1).stderr
    assert tc.refresh().status == "active"


def test_futures_tell_their_outcome(tg, tc: TrainingClient) -> None:
    """Operations of a run are listed newest first; each shows its result or its error."""
    passed = tc.forward_backward(BATCH)
    loss = passed.result().loss
    tc.optim_step().result()
    with pytest.raises(InvalidRequestError):
        tc.optim_step().result()
    failed, stepped, first = tg.json("futures", "ls", "--run", tc.id)
    assert [one["operation"] for one in (failed, stepped, first)] == ["optim_step", "optim_step", "forward_backward"]
    assert [one["status"] for one in (failed, stepped, first)] == ["failed", "completed", "completed"]
    assert tg.json("futures", "show", passed.id)["result"]["loss"] == loss
    assert tg.json("futures", "show", failed["future_id"])["code"] == "VALIDATION_ERROR"
    assert passed.id in tg("futures", "ls", "--run", tc.id, "--status", "completed").stdout


def test_what_is_done_cannot_be_cancelled(tg, tc: TrainingClient) -> None:
    """Cancelling too late says so and exits with 1; an unknown future is an error of one line."""
    passed = tc.forward_backward(BATCH)
    passed.result()
    assert "it is completed" in tg("futures", "cancel", passed.id, code=1).stdout
    assert "no such future" in tg("futures", "show", "fut-none", code=1).stderr


def test_another_server_is_named_by_its_url(tg) -> None:
    """A URL at which nobody answers is an error that repeats it."""
    assert "http://127.0.0.1:9" in tg("clients", "ls", "--base-url", "http://127.0.0.1:9", code=1).stderr
