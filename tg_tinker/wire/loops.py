"""The Loops wire: the trainer ("dp_worker"), the sampler, and the control plane under ``/v1/loops``.

Trainer operations are accepted with ``202 {operation_id, schema_version}`` and retrieved from ``/operations/{id}``.
Trainer and sampler paths are relative to the ``base_url`` that the control plane hands out. Source: the Loops SDK 0.32.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import attrs

from tg_tinker.types import checks, loops, loops_results
from tg_tinker.wire.route import Route

SCHEMA_VERSION = 1
PENDING = 408


@attrs.frozen(kw_only=True)
class PassRequest:
    """``forward`` and ``forward_backward``. Sequence, run and model ride along for the trainer's own checks."""

    data: tuple[loops.Datum, ...]
    loss_fn: str = "cross_entropy"
    loss_fn_config: dict[str, Any] | None = None
    seq_id: int | None = None
    run_id: str | None = None
    top_k_logprobs: int = 0
    model: str | None = None


@attrs.frozen(kw_only=True)
class OptimStepRequest:
    """One optimizer step."""

    adam_params: loops.AdamParams
    seq_id: int | None = None
    run_id: str | None = None
    model: str | None = None


@attrs.frozen(kw_only=True)
class SaveStateRequest:
    """A checkpoint of weights and optimizer under a name."""

    name: str
    ttl_seconds: int | None = None
    seq_id: int | None = None
    run_id: str | None = None
    model: str | None = None


@attrs.frozen(kw_only=True)
class SaveWeightsForSamplerRequest:
    """Publish the adapter under a name; every publish makes a new version.

    With ``bump_version`` it takes over from checkpoints that published clients sample from until then.
    """

    name: str
    ttl_seconds: int | None = None
    bump_version: bool = False
    seq_id: int | None = None
    run_id: str | None = None
    model: str | None = None


@attrs.frozen(kw_only=True)
class LoadStateRequest:
    """A ``bt://loops:<run>/weights/<name>`` URI."""

    path: str
    seq_id: int | None = None
    run_id: str | None = None
    model: str | None = None


@attrs.frozen(kw_only=True)
class InitTrainerServerRequest:
    """A fresh adapter of the given rank."""

    lora_rank: int = attrs.field(validator=checks.integer(1, 512))
    base_model: str | None = None
    seq_id: int | None = None
    run_id: str | None = None
    model: str | None = None


@attrs.frozen(kw_only=True)
class Accepted:
    """What a submit answers with 202."""

    operation_id: str
    schema_version: int = SCHEMA_VERSION


@attrs.frozen(kw_only=True)
class Outcome:
    """What ``/operations/{id}`` answers with 200; ``code``, ``details`` and ``request_id`` are ours."""

    status: str
    operation_id: str | None = None
    result: Any = None
    error: str | None = None
    error_class: str | None = None
    code: str | None = None
    details: dict[str, Any] | None = None
    request_id: str | None = None


@attrs.frozen(kw_only=True)
class PolicyVersion:
    """On the trainer: optimizer steps applied. On the sampler: the newest published version it serves."""

    policy_version: int


@attrs.frozen(kw_only=True)
class TrainerRequest:
    """``POST /v1/loops/trainers``. The first five fields are published; the rest are ours or ignored here."""

    base_model: str
    session_id: str | None = None
    lora_rank: int = attrs.field(default=32, validator=checks.integer(1, 512))
    seed: int | None = None
    max_seq_len: int | None = None
    path: str | None = None
    name: str | None = None
    replicas: int = 1
    scope: str | None = None
    dp_config: dict[str, Any] | None = None
    with_sampler: bool | None = None  # ours: ``save_state`` is to publish as well


@attrs.frozen(kw_only=True)
class StatusName:
    """The published shape of a status."""

    name: str


@attrs.frozen(kw_only=True)
class Run:
    """A trainer. ``base_url`` is where its data plane lives; it is on this server when it starts with "/"."""

    id: str
    session_id: str | None
    base_model: str
    base_url: str
    created_at: datetime
    status: StatusName
    deployment_id: str | None = None
    name: str | None = None
    lora_rank: int | None = None
    max_seq_len: int | None = None
    sampler: dict[str, Any] | None = None


@attrs.frozen(kw_only=True)
class RunEnvelope:
    """The body ``{"run": ...}``."""

    run: Run


@attrs.frozen(kw_only=True)
class Deployment:
    """What a published trainer runs on; ours is always "RUNNING"."""

    id: str
    status: StatusName


@attrs.frozen(kw_only=True)
class DeploymentEnvelope:
    """The body ``{"deployment": ...}``."""

    deployment: Deployment


@attrs.frozen(kw_only=True)
class SamplerRequest:
    """Exactly one of ``run_id`` (the run's paired sampler), ``base_model`` and ``model_path``."""

    session_id: str | None = None
    run_id: str | None = None
    base_model: str | None = None
    model_path: str | None = None
    max_seq_length: int | None = None
    scope: str | None = None


@attrs.frozen(kw_only=True)
class Sampler:
    """A sampler and where it lives."""

    id: str
    base_url: str
    base_model: str
    created_at: datetime
    status: StatusName
    model_id: str | None = None
    deployment_id: str | None = None


@attrs.frozen(kw_only=True)
class SamplerEnvelope:
    """The body ``{"sampler": ...}``."""

    sampler: Sampler


@attrs.frozen(kw_only=True)
class Session:
    """A group of runs."""

    id: str


@attrs.frozen(kw_only=True)
class SessionEnvelope:
    """The body ``{"session": ...}``."""

    session: Session


@attrs.frozen(kw_only=True)
class CheckpointsEnvelope:
    """The body ``{"checkpoints": [...]}``."""

    checkpoints: tuple[loops_results.Checkpoint, ...]


# -- the trainer's data plane, relative to Run.base_url
INIT_TRAINER_SERVER = Route(
    "init_trainer_server", "POST", "/init_trainer_server", loops_results.InitTrainerServerResponse, "submit"
)
FORWARD = Route("forward", "POST", "/forward", loops_results.ForwardBackwardOutput, "submit")
FORWARD_BACKWARD = Route("forward_backward", "POST", "/forward_backward", loops_results.ForwardBackwardOutput, "submit")
OPTIM_STEP = Route("optim_step", "POST", "/optim_step", loops_results.OptimStepResponse, "submit")
SAVE_STATE = Route("save_state", "POST", "/save_state", loops_results.SaveWeightsResponse, "submit")
SAVE_WEIGHTS_FOR_SAMPLER = Route(
    "save_weights_for_sampler",
    "POST",
    "/save_weights_for_sampler",
    loops_results.SaveWeightsForSamplerResponse,
    "submit",
)
LOAD_STATE = Route("load_state", "POST", "/load_state", loops_results.LoadWeightsResponse, "submit")
LOAD_STATE_WITH_OPTIMIZER = Route(
    "load_state_with_optimizer", "POST", "/load_state_with_optimizer", loops_results.LoadWeightsResponse, "submit"
)
OPERATION = Route("operation", "GET", "/operations/{id}", Outcome)
OPERATION_CANCEL = Route("operation_cancel", "POST", "/operations/{id}/cancel", dict[str, Any])
POLICY_VERSION = Route("policy_version", "GET", "/policy_version", PolicyVersion)
HEALTH = Route("health", "GET", "/health", dict[str, Any])

# -- the sampler's data plane, relative to Sampler.base_url
SAMPLE = Route("sample", "POST", "/sample", loops_results.SampleResponse)
SERVED_VERSION = Route("trainers_policy_version", "GET", "/trainers_policy_version", PolicyVersion)
MODELS = Route("models", "GET", "/v1/models", dict[str, Any])
WAKE = Route("wake", "POST", "/wake", dict[str, Any])

# -- the control plane
CREATE_SESSION = Route("create_session", "POST", "/v1/loops/sessions", SessionEnvelope)
CREATE_TRAINER = Route("create_lora_training_client", "POST", "/v1/loops/trainers", RunEnvelope)
GET_RUN = Route("get_run", "GET", "/v1/loops/runs/{id}", RunEnvelope)
DEPLOYMENT = Route("get_deployment", "GET", "/v1/loops/deployments/{id}", DeploymentEnvelope)
DEACTIVATE_RUN = Route("deactivate_run", "POST", "/v1/loops/runs/{id}/deactivate", dict[str, Any])
CREATE_SAMPLER = Route("create_sampling_client", "POST", "/v1/loops/samplers", SamplerEnvelope)
CHECKPOINTS = Route("list_checkpoints", "GET", "/v1/loops/checkpoints", CheckpointsEnvelope)
CHECKPOINT_VALIDATE = Route("validate_checkpoint", "POST", "/v1/loops/checkpoints/validate", dict[str, Any])
CHECKPOINT_FILES = Route(
    "get_checkpoint_archive_url", "GET", "/v1/loops/checkpoints/{id}/files", loops_results.CheckpointFilesResponse
)
CHECKPOINT_SOURCE = Route("checkpoint_source", "GET", "/v1/loops/checkpoints/{id}/source", dict[str, Any])
CAPABILITIES = Route("get_server_capabilities", "GET", "/v1/loops/capabilities", loops_results.ServerCapabilities)
