"""Why sampling failed, as errors of the tree: they keep no frame, and so no tensor, alive."""

from __future__ import annotations

import copy
import traceback

from tg_tinker.engine import memory
from tg_tinker.errors import OperationFailedError, ServerError, TGTinkerError

__all__ = ["not_finite", "trace", "typed"]


def not_finite() -> OperationFailedError:
    """The error for logits that hold NaN or infinity."""
    message = "the model's logits are not finite: the adapter has diverged; go back to an earlier checkpoint"
    return OperationFailedError(message, operation="sample")


def trace(error: Exception) -> str:
    """Tell where ``error`` comes from as text: a log record with the traceback itself would keep tensors alive."""
    return "".join(traceback.format_exception(error))


def typed(error: Exception) -> TGTinkerError:
    """Say what ``error`` means to those who wait for tokens, as a fresh error each time."""
    if isinstance(error, TGTinkerError):
        return copy.copy(error)
    reason = next(iter(str(error).splitlines()), "")
    if memory.is_exhausted(error):
        advice = "sample fewer or shorter sequences at a time, or choose a smaller model"
        return ServerError(f"out of memory while sampling: {advice} ({reason})", code="OUT_OF_MEMORY")
    return OperationFailedError(f"sampling failed: {type(error).__name__}: {reason}", operation="sample")
