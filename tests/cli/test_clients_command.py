"""`tg-tinker clients` and `futures`: what a running server holds, and what it did."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from fixtures.programs import BATCH, tg_config

from tg_tinker import DPConfig, InvalidRequestError, ServiceClient, TrainingClient
from tg_tinker.server.ownership import Ownership
from tg_tinker.store.checkpoints import CheckpointStore
from tg_tinker.store.database import Database, database_file
from tg_tinker.store.keys import provider_of
from tg_tinker.store.rows import RunRow
from tg_tinker.store.sqlite import sqlite_url

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


async def remember(home: Path, owners: dict[str, str], *, deleted: str) -> None:
    """Write runs (id -> server) into the database of a home, as their servers did, oldest first."""
    database, begun = await Database.open(sqlite_url(database_file(home))), datetime.now(UTC)
    await database.add_tenant("local", begun)
    for number, (run, owner) in enumerate(owners.items()):
        at = begun + timedelta(seconds=number)
        await database.add_run(
            RunRow(
                run_id=run,
                tenant_id="local",
                surface="tg",
                model_ref="m",
                status="active",
                step=0,
                config={},
                created_at=at,
                updated_at=at,
                state={"owner": owner},
            )
        )
    await database.update_run("local", deleted, status="deleted")
    await database.close()


def test_runs_of_other_servers_are_remembered(tg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended with its server is listed with what was saved last; one that another server holds says so."""
    monkeypatch.setenv("TG_TINKER_HOME", str(tmp_path))
    assert str(tmp_path) in tg("clients", "ls").stderr.replace("\n", "")
    store = CheckpointStore(tmp_path / "artifacts", provider_of(tmp_path))
    saved = [
        store.save(
            tenant="local",
            run_id="tc-ended",
            kind="tg_state",
            step=step,
            tensors={"a": np.zeros(1)},
            counters={},
            metadata={},
        )
        for step in (3, 7)
    ]
    other = Ownership(tmp_path)
    try:
        owners = {"tc-ended": "server-1-00000000", "tc-deleted": "server-1-00000000", "tc-held": other.name}
        asyncio.run(remember(tmp_path, owners, deleted="tc-deleted"))
        rows = tg.json("clients", "ls")
        told = tg("clients", "ls", "--status", "ended")
    finally:
        other.release()
    assert [(row["training_client_id"], row["status"], row["step"]) for row in rows] == [
        ("tc-held", "elsewhere", None),
        ("tc-ended", "ended", 7),
    ]
    assert rows[1]["artifact_id"] == saved[1].artifact_id
    assert saved[1].artifact_id in told.stdout
    assert "tc-held" not in told.stdout
    assert "checkpoint_id" in told.stderr


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


def test_programs_are_told_what_was_done(tg, service: ServiceClient) -> None:
    """Cancelling and removing print JSON where that is asked for; of several runs also those before one that fails."""
    run = service.create_training_client(tg_config())
    passed = run.forward_backward(BATCH)
    passed.result()
    told = json.loads(tg("futures", "cancel", passed.id, "--format", "json", code=1).stdout)
    assert told == {"future_id": passed.id, "cancelled": False, "status": "completed"}
    said = tg("clients", "rm", run.id, "tc-none", "--yes", "--format", "json", code=1)
    assert json.loads(said.stdout) == [{"training_client_id": run.id, "deleted": True}]
    assert "no such training client" in said.stderr


def test_another_server_is_named_by_its_url(tg) -> None:
    """A URL at which nobody answers is an error that repeats it."""
    assert "http://127.0.0.1:9" in tg("clients", "ls", "--base-url", "http://127.0.0.1:9", code=1).stderr
