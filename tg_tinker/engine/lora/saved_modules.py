"""Modules that a run trains whole, beside its adapter (``modules_to_save`` of peft): found, copied, put in place.

The base model never changes: for a pass, its modules compute with the run's copies of their parameters. Weights that
the model ties come apart where only one of the modules is trained, as they do with peft.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Iterator, Mapping

__all__ = ["copies", "in_place", "matches"]

_OWN: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()  # what stands aside while copies are used


def copies(
    model: nn.Module, modules: tuple[str, ...], *, adapted: Collection[str], dtype: torch.dtype
) -> dict[str, nn.Parameter]:
    """Copy every parameter of the modules named, by its name in the model: masters of the run, of the given dtype.

    Raises ``InvalidRequestError`` where a name matches no module with weights, or one with an ``adapted`` layer in it.
    """
    found = [name for name, _ in _weighted(model) if any(matches(name, wanted) for wanted in modules)]
    _check(model, modules, found, adapted)
    return {
        f"{name}.{leaf}": nn.Parameter(value.detach().to(dtype, copy=True))
        for name in found
        for leaf, value in model.get_submodule(name).named_parameters()
    }


@contextmanager
def in_place(model: nn.Module, tensors: Mapping[str, Tensor]) -> Generator[None]:
    """Let ``model`` compute with ``tensors`` instead of its own parameters of those names, inside the block only."""
    before = {name: _get(model, name) for name in _OWN.get(model, {})}
    _place(model, tensors)
    try:
        yield
    finally:
        _place(model, before)


def matches(name: str, wanted: str) -> bool:
    """Say whether peft's rule for layers holds: the full name, or its end at a dot."""
    return name == wanted or name.endswith("." + wanted)


def _check(model: nn.Module, modules: tuple[str, ...], found: list[str], adapted: Collection[str]) -> None:
    lost = [wanted for wanted in modules if not any(matches(name, wanted) for name in found)]
    if lost:
        known = ", ".join(sorted({name.rpartition(".")[2] for name, module in _weighted(model) if _is_leaf(module)}))
        message = f"modules_to_save {lost} match no module with weights; there are: {known}"
        raise InvalidRequestError(message, field="modules_to_save", constraint=f"names among: {known}")
    twice = [layer for layer in adapted if any(layer == name or layer.startswith(name + ".") for name in found)]
    if twice:
        message = f"modules_to_save would train {twice[0]} whole, and target_modules adapts it ({len(twice)} in all)"
        raise InvalidRequestError(message, field="modules_to_save", constraint="modules without an adapted layer")


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give every module that has parameters anywhere, but the model itself, by name."""
    for name, module in cast("Iterable[tuple[str, nn.Module]]", model.named_modules()):
        if name and next(module.parameters(), None) is not None:
            yield name, module


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _place(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, own in _OWN.pop(model, {}).items():
        _set(model, name, own)
    if tensors:
        _OWN[model] = {name: _get(model, name) for name in tensors}
    for name, tensor in tensors.items():
        _set(model, name, tensor)


def _get(model: nn.Module, name: str) -> Tensor:
    module, leaf = _owner(model, name)
    return cast("Tensor", module._parameters[leaf])


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Past ``nn.Module``'s own setter, which takes leaves only: a cast copy of a master is none."""
    module, leaf = _owner(model, name)
    cast("dict[str, Tensor]", module._parameters)[leaf] = tensor


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
