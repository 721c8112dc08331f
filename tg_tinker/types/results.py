"""What the operations of the TG surface give back. Field names and meanings are those of the TG-Tinker pages."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import attrs

from tg_tinker.types.value import Value

FinishReason = Literal["length", "stop", "eos"]


@attrs.frozen(kw_only=True)
class ForwardBackwardResult(Value):
    """``loss`` is the mean over the batch's label tokens (natural log); hashes are ``"sha256:<hex>"``, keyed under DP.

    ``num_tokens`` counts label tokens; ``latency_ms`` is the server's own time from start to end.
    """

    loss: float
    batch_hash: str
    gradient_hash: str
    num_tokens: int
    latency_ms: float


@attrs.frozen(kw_only=True)
class DPMetrics(Value):
    """Privacy spent by one optimizer step and in total, at ``delta``. Norms are means over the step's examples.

    ``total_epsilon`` is None where ``epsilon_is_infinite`` (a step without noise was taken). Norms and clip counts are
    not private outputs. ``gdp_epsilon`` is set by the "gdp" accountant alone, and may under-report.
    """

    noise_applied: bool
    epsilon_spent: float | None
    total_epsilon: float | None
    delta: float
    grad_norm_before_clip: float
    grad_norm_after_clip: float
    num_clipped: int
    epsilon_is_infinite: bool = False
    gdp_epsilon: float | None = None


@attrs.frozen(kw_only=True)
class OptimStepResult(Value):
    """``grad_norm`` is the L2 norm of the step's gradient before clipping; ``step`` counts optimizer steps from 1.

    Under differential privacy it is the norm of the private gradient: that of the noise, mostly.
    """

    grad_norm: float
    learning_rate: float
    step: int
    dp_metrics: DPMetrics | None
    latency_ms: float


@attrs.frozen(kw_only=True)
class Sample(Value):
    """One completion. ``finish_reason``: "length" (max_tokens), "stop" (a stop sequence), "eos" (the model ended).

    ``num_tokens`` counts generated tokens, the stop token included; the stop text is not in ``completion``.
    """

    prompt: str
    completion: str
    num_tokens: int
    finish_reason: FinishReason
    latency_ms: float
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@attrs.frozen(kw_only=True)
class SampleResult(Value):
    """The completions of one ``sample`` call, prompt by prompt, ``num_completions`` each."""

    samples: tuple[Sample, ...]
    total_tokens: int
    latency_ms: float
    model_step: int


@attrs.frozen(kw_only=True)
class StreamChunk(Value):
    """A piece of a streamed completion: newly decided text and the tokens behind it.

    ``index`` says of which of the ``num_completions``. The texts of one concatenate to ``sample``'s completion at the
    same seed. ``finish_reason`` is set on its last chunk alone.
    """

    text: str
    index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


@attrs.frozen(kw_only=True)
class EncryptionInfo(Value):
    """How an artifact is sealed: cipher, id of the key-encryption key, container format."""

    algorithm: str
    key_id: str
    format: str


@attrs.frozen(kw_only=True)
class SaveStateResult(Value):
    """A sealed, durable artifact. ``size_bytes`` is its size at rest, ``timestamp`` the time of saving (UTC)."""

    artifact_id: str
    size_bytes: int
    encryption: EncryptionInfo
    metadata: dict[str, Any]
    timestamp: datetime
    step: int


@attrs.frozen(kw_only=True)
class LoadStateResult(Value):
    """What was restored. ``exact`` says whether training resumes bit for bit; ``reasons`` why not."""

    artifact_id: str
    step: int
    metadata: dict[str, Any]
    timestamp: datetime
    exact: bool = True
    reasons: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class ArtifactInfo(Value):
    """An artifact as the server lists it: all but its content, which only the holder of the key can open.

    ``kind`` is "tg_state", "weights" or "sampler_weights"; ``size_bytes`` counts sealed bytes; ``privacy`` says what a
    run under differential privacy had spent. Times are UTC.
    """

    artifact_id: str
    training_client_id: str
    kind: str
    name: str | None
    step: int
    size_bytes: int
    encryption: EncryptionInfo
    metadata: dict[str, Any]
    privacy: dict[str, Any] | None
    created_at: datetime
    expires_at: datetime | None


def _in_public(status: str) -> str:
    return "active" if status == "ready" else status


@attrs.frozen(kw_only=True)
class TrainingClientInfo(Value):
    """A run as the server lists it; ``status`` is "active" (on the wire "ready"), "completed" or "failed"."""

    training_client_id: str
    tenant_id: str
    model_ref: str
    status: str = attrs.field(converter=_in_public)
    step: int
    created_at: datetime
    config: dict[str, Any]
    dp_metrics: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        """The same as ``training_client_id``."""
        return self.training_client_id


@attrs.frozen(kw_only=True)
class PrivacyReport(Value):
    """The privacy ledger of a run in one look; ``total_epsilon`` is None where it is infinite.

    ``warnings`` say what is doubtful about the run's ``DPConfig``.
    """

    enabled: bool
    accountant: str
    total_epsilon: float | None
    epsilon_is_infinite: bool
    target_epsilon: float | None
    remaining_epsilon: float | None
    delta: float
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: int
    steps: int
    unit: str = "one row of a batch"
    warnings: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class AuditLogEntry(Value):
    """One link of a tenant's audit chain: ``record_hash`` covers every other field and ``prev_hash``.

    ``event`` is "accepted" or "ended"; ``input_digest`` is keyed, so it tells nobody what the input was.
    """

    sequence: int
    entry_id: str
    tenant_id: str
    training_client_id: str | None
    operation: str
    operation_id: str
    event: str
    timestamp: datetime
    success: bool | None
    error_code: str | None
    error_message: str | None
    duration_ms: float | None
    input_digest: str | None
    artifact_ids_produced: tuple[str, ...]
    artifact_ids_consumed: tuple[str, ...]
    dp_metrics: dict[str, Any] | None
    prev_hash: str
    record_hash: str
