"""The TG wire: routes under ``/v1`` and the bodies they take.

Long operations are accepted with 202 and a future. ``sample``, ``save_state`` and ``load_state`` answer 200 when done,
or are accepted like the others where the request says ``Prefer: respond-async``. Source: the TG-Tinker pages.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import attrs

from tg_tinker.types import checks, results
from tg_tinker.types.batch import BatchData
from tg_tinker.types.loops import MOST_STOPS
from tg_tinker.types.value import Value
from tg_tinker.wire.route import Route

Status = Literal["pending", "running", "completed", "failed", "cancelled"]
ENDED = ("completed", "failed", "cancelled")
READY = "ready"  # what this wire calls a run that is "active"
MOST_COMPLETIONS = 16_384  # of one sample
RUN_COMPLETED, RUN_FAILED = "RUN_COMPLETED", "RUN_FAILED"  # codes of errors that tell what has become of the run


@attrs.frozen(kw_only=True)
class ForwardBackwardRequest:
    """``mode`` "eval" computes the loss alone: no gradient, no privacy spent."""

    batch: BatchData
    batch_hash: str | None = None
    mode: Literal["train", "eval"] = "train"


@attrs.frozen(kw_only=True)
class OptimStepRequest:
    """``apply_dp_noise`` matters on runs with differential privacy alone."""

    apply_dp_noise: bool = True
    mode: Literal["train", "eval"] = "train"


def _prompts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else checks.tupled(value)


def _stops(value: Any) -> Any:
    return () if value is None else _prompts(value)


@attrs.frozen(kw_only=True)
class SampleRequest:
    """The arguments of ``sample`` and ``sample_stream``, checked; one prompt may come as a plain string."""

    prompts: tuple[str, ...] = attrs.field(converter=_prompts, validator=checks.texts())
    max_tokens: int = attrs.field(default=128, validator=checks.integer(1))
    temperature: float = attrs.field(default=1.0, validator=checks.number(0.0))
    top_p: float = attrs.field(default=1.0, validator=checks.number(above=0.0, high=1.0))
    top_k: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(0)))
    stop_sequences: tuple[str, ...] = attrs.field(
        default=(), converter=_stops, validator=checks.texts(empty=True, most=MOST_STOPS)
    )
    num_completions: int = attrs.field(default=1, validator=checks.integer(1, 1024))
    repetition_penalty: float = attrs.field(default=1.0, validator=checks.number(above=0.0))
    presence_penalty: float = attrs.field(default=0.0, validator=checks.number(-2.0, 2.0))
    frequency_penalty: float = attrs.field(default=0.0, validator=checks.number(-2.0, 2.0))
    seed: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(0, 2**63 - 1)))

    def __attrs_post_init__(self) -> None:
        """Refuse more completions than a request can hold without keeping all others waiting."""
        if len(self.prompts) * self.num_completions > MOST_COMPLETIONS:
            wanted = f"at most {MOST_COMPLETIONS} completions of all prompts together"
            raise checks.refuse("num_completions", wanted, len(self.prompts) * self.num_completions)


@attrs.frozen(kw_only=True)
class SaveStateRequest:
    """``metadata`` is any JSON object, stored inside the sealed artifact's manifest."""

    include_optimizer: bool = True
    metadata: dict[str, Any] = attrs.field(factory=dict, validator=checks.json_object())


@attrs.frozen(kw_only=True)
class LoadStateRequest:
    """The artifact to restore."""

    artifact_id: str


@attrs.frozen(kw_only=True)
class FutureInfo(Value):
    """An accepted operation: what a submit answers with 202."""

    future_id: str
    status: Status
    created_at: datetime
    training_client_id: str | None
    operation: str
    started_at: datetime | None = None
    completed_at: datetime | None = None


@attrs.frozen(kw_only=True)
class FutureResult:
    """A future and, once it ended, its result or its error (the fields of an error body)."""

    future_id: str
    status: Status
    result: Any = None
    error: dict[str, Any] | None = None


@attrs.frozen(kw_only=True)
class CancelResult:
    """``success`` says whether the operation was kept from running."""

    success: bool


@attrs.frozen(kw_only=True)
class TokenizerFiles:
    """The text files of a saved tokenizer, by name."""

    model: str
    files: dict[str, str]


@attrs.frozen(kw_only=True)
class Health:
    """``extensions`` names what this server offers beyond the published wires."""

    status: str
    service: str = "tg-tinker"
    version: str = ""
    extensions: tuple[str, ...] = ()


_CLIENT = "/v1/training_clients/{id}"

CREATE = Route("create_training_client", "POST", "/v1/training_clients", results.TrainingClientInfo)
LIST = Route("list_training_clients", "GET", "/v1/training_clients", list[results.TrainingClientInfo])
GET = Route("get_training_client", "GET", _CLIENT, results.TrainingClientInfo)
DELETE = Route("delete_training_client", "DELETE", _CLIENT, dict[str, Any])
FORWARD_BACKWARD = Route(
    "forward_backward", "POST", f"{_CLIENT}/forward_backward", results.ForwardBackwardResult, "submit"
)
OPTIM_STEP = Route("optim_step", "POST", f"{_CLIENT}/optim_step", results.OptimStepResult, "submit")
SAMPLE = Route("sample", "POST", f"{_CLIENT}/sample", results.SampleResult, "submit")
SAMPLE_STREAM = Route("sample_stream", "POST", f"{_CLIENT}/sample_stream", results.StreamChunk, "stream")
SAVE_STATE = Route("save_state", "POST", f"{_CLIENT}/save_state", results.SaveStateResult, "submit")
LOAD_STATE = Route("load_state", "POST", f"{_CLIENT}/load_state", results.LoadStateResult, "submit")
PRIVACY = Route("get_privacy_report", "GET", f"{_CLIENT}/privacy", results.PrivacyReport)
FUTURES = Route("list_futures", "GET", "/v1/futures", list[FutureInfo])
FUTURE = Route("get_future", "GET", "/v1/futures/{id}", FutureInfo)
FUTURE_RESULT = Route("future_result", "GET", "/v1/futures/{id}/result", FutureResult)
FUTURE_CANCEL = Route("future_cancel", "POST", "/v1/futures/{id}/cancel", CancelResult)
ARTIFACTS = Route("list_artifacts", "GET", "/v1/artifacts", list[results.ArtifactInfo])
ARTIFACT = Route("delete_artifact", "DELETE", "/v1/artifacts/{id}", dict[str, Any])
ARTIFACT_CONTENT = Route("pull_artifact", "GET", "/v1/artifacts/{id}/content", bytes)
AUDIT_LOGS = Route("get_audit_logs", "GET", "/v1/audit_logs", list[results.AuditLogEntry])
AUDIT_HEAD = Route("get_audit_head", "GET", "/v1/audit_logs/head", dict[str, Any])
TOKENIZER = Route("get_tokenizer", "GET", "/v1/tokenizer", TokenizerFiles)
HEALTH = Route("health", "GET", "/healthz", Health)
