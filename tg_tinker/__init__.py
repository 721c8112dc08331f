"""Fine-tune and sample language models step by step, with a server of your own or one elsewhere.

``ServiceClient`` is the way in. Names are loaded on first use, so importing this costs next to nothing. The names of
the Loops surface are in ``tg_tinker.loops``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tg_tinker.errors import (
    AuthenticationError,
    AuthorizationError,
    BlockingCallError,
    BlockingCallWarning,
    ClientClosedError,
    DPBudgetExceededError,
    FutureCancelledError,
    FutureTimeoutError,
    InvalidRequestError,
    OperationFailedError,
    QueueFullError,
    QuotaExceededError,
    RateLimitedError,
    ResourceNotFoundError,
    SamplerNotReadyError,
    ServerError,
    ServerRestartedError,
    ServerUnreachableError,
    TGTinkerError,
    UnretrievedOperationWarning,
)

if TYPE_CHECKING:
    from tg_tinker.futures import FutureHandle, OperationFuture
    from tg_tinker.privacy.poisson import PoissonSampler
    from tg_tinker.sampling import SamplingClient
    from tg_tinker.service import ServiceClient
    from tg_tinker.store.offline import open_artifact
    from tg_tinker.training import TrainingClient
    from tg_tinker.types.batch import BatchData
    from tg_tinker.types.config import DPConfig, LoRAConfig, OptimizerConfig, SamplingConfig, TrainingConfig
    from tg_tinker.types.loops import AdamParams, Datum, ModelInput, SamplingParams
    from tg_tinker.types.results import (
        ArtifactInfo,
        AuditLogEntry,
        DPMetrics,
        EncryptionInfo,
        ForwardBackwardResult,
        LoadStateResult,
        OptimStepResult,
        PrivacyReport,
        Sample,
        SampleResult,
        SaveStateResult,
        StreamChunk,
        TrainingClientInfo,
    )
    from tg_tinker.types.tensor import TensorData
    from tg_tinker.verify import AuditHead, AuditVerification, verify_audit_log
    from tg_tinker.wire.digest import batch_hash
    from tg_tinker.wire.tg import FutureInfo

    __version__: str

__all__ = [
    "AdamParams",
    "ArtifactInfo",
    "AuditHead",
    "AuditLogEntry",
    "AuditVerification",
    "AuthenticationError",
    "AuthorizationError",
    "BatchData",
    "BlockingCallError",
    "BlockingCallWarning",
    "ClientClosedError",
    "DPBudgetExceededError",
    "DPConfig",
    "DPMetrics",
    "Datum",
    "EncryptionInfo",
    "ForwardBackwardResult",
    "FutureCancelledError",
    "FutureHandle",
    "FutureInfo",
    "FutureTimeoutError",
    "InvalidRequestError",
    "LoRAConfig",
    "LoadStateResult",
    "ModelInput",
    "OperationFailedError",
    "OperationFuture",
    "OptimStepResult",
    "OptimizerConfig",
    "PoissonSampler",
    "PrivacyReport",
    "QueueFullError",
    "QuotaExceededError",
    "RateLimitedError",
    "ResourceNotFoundError",
    "Sample",
    "SampleResult",
    "SamplerNotReadyError",
    "SamplingClient",
    "SamplingConfig",
    "SamplingParams",
    "SaveStateResult",
    "ServerError",
    "ServerRestartedError",
    "ServerUnreachableError",
    "ServiceClient",
    "StreamChunk",
    "TGTinkerError",
    "TensorData",
    "TrainingClient",
    "TrainingClientInfo",
    "TrainingConfig",
    "UnretrievedOperationWarning",
    "__version__",
    "batch_hash",
    "open_artifact",
    "verify_audit_log",
]

_HOMES = {
    "tg_tinker.futures": "FutureHandle OperationFuture",
    "tg_tinker.privacy.poisson": "PoissonSampler",
    "tg_tinker.sampling": "SamplingClient",
    "tg_tinker.service": "ServiceClient",
    "tg_tinker.store.offline": "open_artifact",
    "tg_tinker.training": "TrainingClient",
    "tg_tinker.types.batch": "BatchData",
    "tg_tinker.types.config": "DPConfig LoRAConfig OptimizerConfig SamplingConfig TrainingConfig",
    "tg_tinker.types.loops": "AdamParams Datum ModelInput SamplingParams",
    "tg_tinker.types.results": (
        "ArtifactInfo AuditLogEntry DPMetrics EncryptionInfo ForwardBackwardResult LoadStateResult OptimStepResult "
        "PrivacyReport Sample SampleResult SaveStateResult StreamChunk TrainingClientInfo"
    ),
    "tg_tinker.types.tensor": "TensorData",
    "tg_tinker.verify": "AuditHead AuditVerification verify_audit_log",
    "tg_tinker.wire.digest": "batch_hash",
    "tg_tinker.wire.tg": "FutureInfo",
}
_PLACES = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("tg-tinker")
    elif name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
