from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fixtures.processes import gone

from tg_tinker.types.results import AuditLogEntry
from tg_tinker.verify import AuditHead, verify_audit_log
from tg_tinker.wire import codec

KEY = "process-key"

pytestmark = pytest.mark.timeout(240)  # servers of their own, of which some load torch


@contextmanager
def server(home: Path, *arguments: str, key: str | None = KEY) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server process, once it listens."""
    environment = {**os.environ, **({"TG_TINKER_EMBEDDED_KEY": key} if key else {})}
    child = subprocess.Popen(
        [sys.executable, "-m", "tg_tinker.server", "--home", str(home), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    try:
        yield child, ready(child)
    finally:
        child.kill()
        child.communicate()


def ready(child: subprocess.Popen[bytes]) -> str:
    """The URL of the ready line, which is one line of JSON."""
    said = json.loads(child.stdout.readline())
    assert said["pid"] == child.pid
    return str(said["url"])


def ask(method: str, url: str, body: Any, heads: list[str]) -> Any:
    """The JSON of an answer; the audit head that came with it is added to ``heads``."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {KEY}"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.headers["X-TG-Audit-Head"]:
            heads.append(response.headers["X-TG-Audit-Head"])
        return json.load(response)


def post(url: str, body: Any, heads: list[str]) -> Any:
    """The JSON that a POST is answered with."""
    return ask("POST", url, body, heads)


def get(url: str, key: str | None = None) -> int:
    """The status of a GET."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_child_says_where_it_listens_and_wants_the_key(tmp_path):
    """One JSON line gives the URL; the key of the environment alone opens it; SIGTERM ends it with 0."""
    with server(tmp_path, "--parent", str(os.getpid())) as (child, url):
        assert url.startswith("http://127.0.0.1:")
        assert get(f"{url}/healthz") == 200
        assert get(f"{url}/v1/training_clients") == 401
        assert get(f"{url}/v1/training_clients", KEY) == 200
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
        assert KEY.encode() not in child.stderr.read()


def test_without_a_key_the_child_does_not_start(tmp_path):
    """A missing key is an error that names the variable."""
    environment = {name: value for name, value in os.environ.items() if name != "TG_TINKER_EMBEDDED_KEY"}
    child = subprocess.run(
        [sys.executable, "-m", "tg_tinker.server", "--home", str(tmp_path)],
        capture_output=True, env=environment, timeout=200, check=False,
    )  # fmt: skip
    assert child.returncode == 2
    assert b"TG_TINKER_EMBEDDED_KEY" in child.stderr


PARENT = """
import json, os, subprocess, sys, time
command = [sys.executable, "-m", "tg_tinker.server", "--home", sys.argv[1], "--parent", str(os.getpid())]
child = subprocess.Popen(command, stdout=subprocess.PIPE)
print(child.stdout.readline().decode(), flush=True)
time.sleep(600)
"""


def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    """A kill -9 of the parent ends the server, which nobody told."""
    environment = {**os.environ, "TG_TINKER_EMBEDDED_KEY": KEY}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        pid = json.loads(parent.stdout.readline())["pid"]
        os.kill(pid, 0)
    finally:
        parent.kill()
        parent.communicate()
    while not gone(pid):
        time.sleep(0.05)


def test_a_parent_that_is_gone_already_ends_it_at_once(tmp_path):
    """A child whose parent died before it could watch it does not stay."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with server(tmp_path, "--parent", str(gone.pid)) as (child, _):
        assert child.wait(60) == 0


def test_two_servers_share_a_home(tmp_path):
    """Two processes on one home serve at the same time."""
    with server(tmp_path) as (_, first), server(tmp_path, key="second") as (_, second):
        assert get(f"{first}/v1/training_clients", KEY) == 200
        assert get(f"{second}/v1/training_clients", "second") == 200
        assert get(f"{second}/v1/training_clients", KEY) == 401


def test_a_killed_server_leaves_entries_of_all_that_it_told(tmp_path):
    """After kill -9 the audit log has both entries of every operation whose result was given; its chain is whole."""
    told, heads = [], []
    with server(tmp_path) as (child, url):
        run = post(f"{url}/v1/training_clients", {"model_ref": "tg-tinker/tiny"}, heads)["training_client_id"]
        saved = post(f"{url}/v1/training_clients/{run}/save_state", {}, heads)["artifact_id"]
        for _ in range(5):
            for name, body in (("forward_backward", {"batch": {"input_ids": [[1, 2, 3]]}}), ("optim_step", {})):
                future = post(f"{url}/v1/training_clients/{run}/{name}", body, heads)["future_id"]
                outcome = ask("GET", f"{url}/v1/futures/{future}/result?wait=60", None, heads)
                assert outcome["status"] == "completed", outcome
                told.append(future)
        child.kill()
    with server(tmp_path) as (_, url):
        logs = ask("GET", f"{url}/v1/audit_logs?limit=1000", None, [])
    entries = [codec.decode(AuditLogEntry, fields) for fields in logs]
    kept = [codec.decode(AuditHead, codec.loads(head.encode())) for head in dict.fromkeys(heads)]
    assert kept
    assert verify_audit_log(entries, tenant_id=entries[0].tenant_id, heads=kept).ok
    written = Counter((entry.operation_id, entry.event) for entry in entries)
    assert {written[future, event] for future in told for event in ("accepted", "ended")} == {1}
    assert saved in {artifact for entry in entries for artifact in entry.artifact_ids_produced}


def test_a_taken_port_is_an_error(tmp_path):
    """The process does not hang, or choose another port, when its port is taken."""
    with server(tmp_path) as (_, url):
        port = url.rpartition(":")[2]
        child = subprocess.run(
            [sys.executable, "-m", "tg_tinker.server", "--home", str(tmp_path), "--port", port],
            capture_output=True, env={**os.environ, "TG_TINKER_EMBEDDED_KEY": KEY}, timeout=200, check=False,
        )  # fmt: skip
    assert child.returncode != 0
    assert b"address already in use" in child.stderr
