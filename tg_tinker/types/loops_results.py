"""What the operations of the Loops surface give back. Field names and meanings are those of the Loops pages."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import attrs

from tg_tinker.types.tensor import TensorData
from tg_tinker.types.value import Value

StopReason = Literal["stop", "length"]


@attrs.frozen(kw_only=True)
class ForwardBackwardOutput(Value):
    """``loss`` is the mean over active tokens (natural log). ``loss_fn_outputs`` has one dict per datum, in order.

    Each holds ``logprobs``: the target's log probability at every input position, ``(N,)`` float32, 0.0 where ignored.
    ``metrics`` has ``loss``, ``loss:sum``, ``num_tokens``, and for RL losses ratio, clip fraction, ``mismatch_kl`` and
    entropy.
    """

    loss: float = 0.0
    loss_fn_output_type: str = "logprobs"
    loss_fn_outputs: tuple[dict[str, TensorData], ...] = ()
    metrics: dict[str, float] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class OptimStepResponse(Value):
    """``metrics``: ``step``, ``learning_rate``, ``lr``, ``grad_norm`` (L2, before clipping); ``epsilon`` under DP."""

    metrics: dict[str, float] | None = None


@attrs.frozen(kw_only=True)
class SaveWeightsResponse(Value):
    """``path`` is the checkpoint's ``bt://loops:<run>/weights/<name>`` URI."""

    mode: str = ""
    path: str = ""


@attrs.frozen(kw_only=True)
class SaveWeightsForSamplerResponse(Value):
    """A published, immutable adapter version and its ``bt://loops:<run>/sampler_weights/<name>`` URI."""

    version: int = 0
    path: str = ""
    mode: str = ""


@attrs.frozen(kw_only=True)
class LoadWeightsResponse(Value):
    """The optimizer step that was restored; without the optimizer it restarts from the checkpoint's step."""

    step: int = 0


@attrs.frozen(kw_only=True)
class InitTrainerServerResponse(Value):
    """A fresh adapter of ``lora_rank`` at step 0."""

    lora_rank: int
    step: int = 0


@attrs.frozen(kw_only=True)
class SampledSequence(Value):
    """One completion: tokens and their log probabilities (natural log, temperature-scaled, before top-k and top-p)."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    stop_reason: StopReason = "length"
    text: str | None = None


@attrs.frozen(kw_only=True)
class SampleResponse(Value):
    """``num_samples`` sequences of one prompt; ``prompt_logprobs[0]`` is None, for nothing precedes the first token.

    ``policy_version`` is the version of the weights that sampled. ``topk_prompt_logprobs`` lists (token, logprob) pairs
    by position, best first.
    """

    sequences: tuple[SampledSequence, ...]
    policy_version: int | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    topk_prompt_logprobs: tuple[tuple[tuple[int, float], ...] | None, ...] | None = None


@attrs.frozen(kw_only=True)
class LoraAdapterConfig(Value):
    """The adapter's rank."""

    rank: int


@attrs.frozen(kw_only=True)
class Checkpoint(Value):
    """A saved checkpoint: ``checkpoint_id`` is its name; its ``target`` is what it is for, resuming or sampling."""

    id: str = ""
    run_id: str
    checkpoint_id: str
    checkpoint_type: str = "lora"
    created_at: datetime
    base_model: str
    lora_adapter_config: LoraAdapterConfig | None = None
    size_bytes: int = 0
    sync_status: str | None = None
    target: Literal["sampler", "trainer"] | None = None
    expires_at: datetime | None = None


@attrs.frozen(kw_only=True)
class CheckpointFile(Value):
    """One file of a checkpoint, at a signed URL that expires; ``sha256`` is that of its content."""

    url: str
    relative_file_name: str
    node_rank: int = 0
    size_bytes: int
    last_modified: datetime
    sha256: str | None = None


@attrs.frozen(kw_only=True)
class CheckpointFilesResponse(Value):
    """A page of files; ``next_page_token`` asks for the next page, None ends."""

    presigned_urls: tuple[CheckpointFile, ...]
    next_page_token: int | None = None
    total_count: int = 0


@attrs.frozen(kw_only=True)
class CheckpointDownload(Value):
    """A checkpoint that was downloaded and verified."""

    dest_dir: str
    file_count: int
    bytes_written: int


@attrs.frozen(kw_only=True)
class ModelData(Value):
    """The model behind a run."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@attrs.frozen(kw_only=True)
class GetInfoResponse(Value):
    """Base model, LoRA rank (None: a trainer that does not tell) and sequence limit (tokens) of a run."""

    model_data: ModelData
    model_name: str
    is_lora: bool
    lora_rank: int | None
    max_seq_len: int | None


@attrs.frozen(kw_only=True)
class SupportedModel(Value):
    """A model that the server can load, and its context length in tokens where known."""

    model_name: str
    max_context_length: int | None = None


@attrs.frozen(kw_only=True)
class ServerCapabilities(Value):
    """What the server offers: models, losses, wire extensions."""

    supported_models: tuple[SupportedModel, ...]
    losses: tuple[str, ...] = ()
    extensions: tuple[str, ...] = ()
    details: dict[str, Any] = attrs.field(factory=dict)
