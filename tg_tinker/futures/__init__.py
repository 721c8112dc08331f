"""The handle of an operation. Who fetches its outcome is not known here (see ``core``)."""

from tg_tinker.futures.future import APIFuture, FutureHandle, OperationFuture

__all__ = ["APIFuture", "FutureHandle", "OperationFuture"]
