"""The Loops surface: change the import line of a Loops program to this, and it runs here.

Names are loaded on first use. ``TrainingClient`` and ``SampleResult`` mean other things here than in ``tg_tinker``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tg_tinker.futures import APIFuture, OperationFuture
    from tg_tinker.loops.service import ServiceClient
    from tg_tinker.loops.tracking import Tracker, WandbConfig, WandbTracker
    from tg_tinker.loops.training import TrainingClient
    from tg_tinker.sampling import SamplingClient
    from tg_tinker.types.loops import AdamParams, Datum, EncodedTextChunk, ModelInput, SamplingParams
    from tg_tinker.types.loops import EncodedTextChunk as ModelInputChunk
    from tg_tinker.types.loops import LossName as LossFnType
    from tg_tinker.types.loops_results import (
        Checkpoint,
        CheckpointDownload,
        CheckpointFile,
        CheckpointFilesResponse,
        ForwardBackwardOutput,
        GetInfoResponse,
        InitTrainerServerResponse,
        LoadWeightsResponse,
        LoraAdapterConfig,
        ModelData,
        OptimStepResponse,
        SampledSequence,
        SampleResponse,
        SaveWeightsForSamplerResponse,
        SaveWeightsResponse,
        ServerCapabilities,
        StopReason,
        SupportedModel,
    )
    from tg_tinker.types.loops_results import SampleResponse as SampleResult
    from tg_tinker.types.tensor import TensorData

    ForwardBackwardFuture = OperationFuture[ForwardBackwardOutput]

__all__ = [
    "APIFuture",
    "AdamParams",
    "Checkpoint",
    "CheckpointDownload",
    "CheckpointFile",
    "CheckpointFilesResponse",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardFuture",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "InitTrainerServerResponse",
    "LoadWeightsResponse",
    "LoraAdapterConfig",
    "LossFnType",
    "ModelData",
    "ModelInput",
    "ModelInputChunk",
    "OperationFuture",
    "OptimStepResponse",
    "SampleResponse",
    "SampleResult",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "ServerCapabilities",
    "ServiceClient",
    "StopReason",
    "SupportedModel",
    "TensorData",
    "Tracker",
    "TrainingClient",
    "WandbConfig",
    "WandbTracker",
]

_HOMES = {
    "tg_tinker.futures": "APIFuture OperationFuture",
    "tg_tinker.loops.service": "ServiceClient",
    "tg_tinker.loops.tracking": "Tracker WandbConfig WandbTracker",
    "tg_tinker.loops.training": "TrainingClient",
    "tg_tinker.sampling": "SamplingClient",
    "tg_tinker.types.loops": "AdamParams Datum EncodedTextChunk ModelInput SamplingParams",
    "tg_tinker.types.tensor": "TensorData",
    "tg_tinker.types.loops_results": (
        "Checkpoint CheckpointDownload CheckpointFile CheckpointFilesResponse ForwardBackwardOutput GetInfoResponse "
        "InitTrainerServerResponse LoadWeightsResponse LoraAdapterConfig ModelData OptimStepResponse SampledSequence "
        "SampleResponse SaveWeightsForSamplerResponse SaveWeightsResponse ServerCapabilities StopReason SupportedModel"
    ),
}
_PLACES = {name: (module, name) for module, names in _HOMES.items() for name in names.split()} | {
    "ForwardBackwardFuture": ("tg_tinker.futures", "OperationFuture"),
    "LossFnType": ("tg_tinker.types.loops", "LossName"),
    "ModelInputChunk": ("tg_tinker.types.loops", "EncodedTextChunk"),
    "SampleResult": ("tg_tinker.types.loops_results", "SampleResponse"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
