"""What went wrong, as a value: each look at it makes a fresh exception, so tracebacks never pile up."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import attrs

from tg_tinker.errors import TGTinkerError, restore

__all__ = ["Failure"]


@attrs.frozen
class Failure:
    """A recorded exception: its class and what another one is made of."""

    cls: type[BaseException]
    fields: tuple[Any, ...]
    notes: tuple[str, ...] = ()
    cause: BaseException | None = attrs.field(default=None, eq=False)
    attributes: Mapping[str, Any] = attrs.field(factory=dict, eq=False)  # of somebody else's exception

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Record an exception; its traceback is left behind."""
        if isinstance(error, TGTinkerError):
            fields: tuple[Any, ...] = (error.message, error.code, error.details, error.request_id)
            kept: dict[str, Any] = {}
        else:
            fields, kept = _made_of(error)
        return cls(type(error), fields, tuple(getattr(error, "__notes__", ())), error.__cause__, kept)

    @property
    def code(self) -> str | None:
        """The error's code, where it is one of this package."""
        return str(self.fields[1]) if issubclass(self.cls, TGTinkerError) else None

    def with_note(self, note: str) -> Failure:
        """The same failure with one more line of context."""
        return attrs.evolve(self, notes=(*self.notes, note))

    def error(self) -> BaseException:
        """A new exception that says what happened."""
        if issubclass(self.cls, TGTinkerError):
            error: BaseException = restore(self.cls, *self.fields)
        else:
            error = _again(self.cls, self.fields)
            error.__setstate__(dict(self.attributes))
        error.__cause__ = self.cause
        for note in self.notes:
            error.add_note(note)
        return error


def _made_of(error: BaseException) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and attributes of somebody else's exception, also those that builtins keep to themselves."""
    if isinstance(type(error).__reduce__, FunctionType):  # pickled in a way of its own, which need not be ours
        fields, state = error.args, vars(error)
    else:
        made: Any = error.__reduce__()  # an OSError's file names are here, and nowhere in its ``args``
        fields, state = made[1], made[2] if len(made) > 2 else {}
    return fields, {name: value for name, value in state.items() if name != "__notes__"}


def _again(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """An exception of these ``args``; a constructor written in Python may take other arguments than it keeps."""
    builtin: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
    error: BaseException = builtin.__new__(cls, *args)
    builtin.__init__(error, *args)
    return error
