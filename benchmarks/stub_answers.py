"""What the stub says: whole HTTP responses, made once. The sizes are those that a real server would send."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from http import HTTPStatus
from typing import Any

from tg_tinker.types import loops_results, results
from tg_tinker.types.config import TrainingConfig
from tg_tinker.types.tensor import TensorData
from tg_tinker.wire import codec, completions, headers, loops, tg

ROWS, LENGTH = 64, 2048  # the large batch: what comes back has a logprob for each of its positions
SAMPLED = 64  # tokens of a sampled completion
LARGE = 100_000  # bytes of a request from which on the answer is the large batch's
MODEL = "stub"
RUN, SAMPLER = "run-1", "sampler-1"

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_HASH = "sha256:" + "0" * 64


def respond(body: object, status: int = 200, extra: Mapping[str, str] | None = None) -> bytes:
    """A whole HTTP response with a JSON body."""
    content = codec.dumps(body)
    lines = {
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        headers.EXTENSIONS: ",".join(headers.OFFERED),
        **(extra or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{head}\r\n".encode() + content


@cache
def find(asked: str, body_size: int) -> bytes:
    """The response to ``"METHOD /path"``."""
    large = body_size > LARGE
    path = asked.partition(" ")[2]
    if asked in _FIXED:
        return _FIXED[asked]()
    if path.startswith("/v1/training_clients/"):
        operation = path.rpartition("/")[2]
        return respond(_future(operation), 202) if operation in _TG_RESULTS else respond(_info())
    if path.startswith("/v1/futures/"):
        name = path.split("/")[3]
        return respond(tg.FutureResult(future_id=name, status="completed", result=_TG_RESULTS[name]()))
    if path.startswith(f"/loops/trainers/{RUN}/operations/"):
        name = path.rpartition("/")[2]
        return respond(loops.Outcome(status="done", operation_id=name, result=_LOOPS_RESULTS[name]()))
    if path.startswith(f"/loops/trainers/{RUN}/"):
        name = path.rpartition("/")[2] + ("-large" if large else "")
        return respond(loops.Accepted(operation_id=name), 202)
    return respond({"error": {"code": "NOT_FOUND", "message": f"the stub does not know {asked}"}}, 404)


def _info() -> results.TrainingClientInfo:
    config = TrainingConfig(model_ref=MODEL).to_dict()
    return results.TrainingClientInfo(
        training_client_id=RUN,
        tenant_id="local",
        model_ref=MODEL,
        status="active",
        step=0,
        created_at=_NOW,
        config=config,
    )


def _future(operation: str) -> tg.FutureInfo:
    return tg.FutureInfo(
        future_id=operation, status="pending", created_at=_NOW, training_client_id=RUN, operation=operation
    )


def _pass(rows: int, length: int) -> loops_results.ForwardBackwardOutput:
    import numpy as np

    rng = np.random.default_rng(0)
    outputs = tuple(
        {"logprobs": TensorData(np.log(rng.random(length)).astype(np.float32), "float32")} for _ in range(rows)
    )
    metrics = {"loss": 1.0, "loss:sum": float(rows * length), "num_tokens": float(rows * length)}
    return loops_results.ForwardBackwardOutput(loss=1.0, loss_fn_outputs=outputs, metrics=metrics)


def _saved() -> results.SaveStateResult:
    encryption = results.EncryptionInfo(algorithm="AES256_GCM", key_id="key", format="stub")
    return results.SaveStateResult(
        artifact_id="art-1", size_bytes=1, encryption=encryption, metadata={}, timestamp=_NOW, step=0
    )


def _run() -> loops.RunEnvelope:
    run = loops.Run(
        id=RUN,
        session_id="session-1",
        base_model=MODEL,
        base_url=f"/loops/trainers/{RUN}",
        created_at=_NOW,
        status=loops.StatusName(name="running"),
        lora_rank=8,
        max_seq_len=4096,
    )
    return loops.RunEnvelope(run=run)


def _sampler() -> loops.SamplerEnvelope:
    sampler = loops.Sampler(
        id=SAMPLER,
        base_url=f"/loops/samplers/{SAMPLER}",
        base_model=MODEL,
        created_at=_NOW,
        status=loops.StatusName(name="running"),
    )
    return loops.SamplerEnvelope(sampler=sampler)


def _sampled() -> bytes:
    tokens = tuple(range(1000, 1000 + SAMPLED))
    logprobs = tuple(-0.123456789 * (1 + index % 7) for index in range(SAMPLED))
    sequence = loops_results.SampledSequence(tokens=tokens, logprobs=logprobs, text="a" * 2 * SAMPLED)
    response = loops_results.SampleResponse(sequences=(sequence,), prompt_token_ids=tuple(range(256)))
    body: Any = completions.response_body(response, model=MODEL, request_id="request-1")
    return respond(body, extra={headers.SERVED_POLICY_VERSION: "1"})


_FIXED: dict[str, Callable[[], bytes]] = {
    "GET /healthz": lambda: respond(tg.Health(status="ok", extensions=headers.OFFERED)),
    "POST /v1/training_clients": lambda: respond(_info(), 201),
    "POST /v1/loops/sessions": lambda: respond(loops.SessionEnvelope(session=loops.Session(id="session-1"))),
    "POST /v1/loops/trainers": lambda: respond(_run()),
    f"GET /v1/loops/runs/{RUN}": lambda: respond(_run()),
    "POST /v1/loops/samplers": lambda: respond(_sampler()),
    f"GET /loops/trainers/{RUN}/policy_version": lambda: respond(loops.PolicyVersion(policy_version=1)),
    f"GET /loops/trainers/{RUN}/health": lambda: respond({"status": "ok"}),
    f"GET /loops/samplers/{SAMPLER}/trainers_policy_version": lambda: respond(loops.PolicyVersion(policy_version=1)),
    f"POST /loops/samplers/{SAMPLER}/sample": _sampled,
}
_TG_RESULTS: dict[str, Callable[[], object]] = {
    "forward_backward": lambda: results.ForwardBackwardResult(
        loss=1.0, batch_hash=_HASH, gradient_hash=_HASH, num_tokens=8, latency_ms=1.0
    ),
    "optim_step": lambda: results.OptimStepResult(
        grad_norm=1.0, learning_rate=1e-4, step=1, dp_metrics=None, latency_ms=1.0
    ),
    "sample": lambda: results.SampleResult(samples=(), total_tokens=0, latency_ms=1.0, model_step=0),
    "save_state": _saved,
}
_LOOPS_RESULTS: dict[str, Callable[[], object]] = {
    "forward_backward": lambda: _pass(1, 8),
    "forward_backward-large": lambda: _pass(ROWS, LENGTH),
    "optim_step": lambda: loops_results.OptimStepResponse(metrics={"step": 1.0, "grad_norm": 1.0}),
    "save_weights_for_sampler": lambda: loops_results.SaveWeightsForSamplerResponse(version=1, path="bt://loops:r/s/1"),
}
