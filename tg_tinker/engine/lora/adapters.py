"""LoRA adapters of many runs on one base model: made from a seed, bound for a pass, frozen for sampling.

The tensors are named as peft names them (``base_model.model.<layer>.lora_A.weight``), so that export and import need
no translation. How a layer applies an adapter is in ``lora_linear``, what an adapter carries of whole modules in
``saved_modules``; where tensors are stored is the store's affair.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar, cast

import attrs
import torch
from torch import Tensor, nn

from tg_tinker.engine.lora import saved_modules
from tg_tinker.engine.lora.lora_linear import Binding, GradientRecorder, RowSeeds, layers_of
from tg_tinker.engine.lora.saved_modules import matches
from tg_tinker.engine.requirements import require
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    from tg_tinker.engine.models.base_model import BaseModel

__all__ = ["Adapter", "AdapterSpec", "FrozenAdapter", "active", "check_tensors", "create", "layer_names"]

T = TypeVar("T", bound=Tensor)

_PREFIX = "base_model.model."


def _names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


@attrs.frozen
class AdapterSpec:
    """What an adapter is made of; two runs with equal specs start from equal tensors."""

    rank: int
    alpha: float
    dropout: float = 0.0
    #: None: every linear layer but the output head (peft "all-linear")
    target_modules: tuple[str, ...] | None = attrs.field(default=None, converter=attrs.converters.optional(_names))
    seed: int = 0
    #: trained whole, beside the adapter
    modules_to_save: tuple[str, ...] = attrs.field(default=(), converter=_names)

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot be built with an ``InvalidRequestError`` that names the field."""
        require(self.rank >= 1, "rank", "a positive integer", self.rank)
        require(math.isfinite(self.alpha) and self.alpha > 0, "alpha", "a positive number", self.alpha)
        require(0.0 <= self.dropout < 1.0, "dropout", "a number from 0 up to, not including, 1", self.dropout)

    @property
    def scale(self) -> float:
        """The factor of the low-rank product: alpha / rank (Hu et al., arXiv:2106.09685, section 4.1)."""
        return self.alpha / self.rank


class Adapter:
    """One run's trainable tensors: fp32 masters, whatever dtype the base model computes in."""

    def __init__(
        self,
        spec: AdapterSpec,
        layers: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
        saved: Mapping[str, nn.Parameter],
        compute_dtype: torch.dtype,
    ) -> None:
        self.spec = spec
        self.names = tuple(sorted(layers))
        self.layers = {name: layers[name] for name in self.names}
        self.saved = dict(saved)  # of the modules that are trained whole, by their names in the model
        self._compute_dtype = compute_dtype
        self._named = _peft_named(self.layers, self.saved)

    def __repr__(self) -> str:
        """Rank, number of layers and number of trainable values."""
        size = sum(tensor.numel() for tensor in self._named.values())
        return f"<Adapter rank {self.spec.rank} on {len(self.names)} layers, {size} values>"

    def parameters(self) -> list[nn.Parameter]:
        """Every trainable tensor, ordered by its peft name."""
        return list(self._named.values())

    def parameter_dict(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by peft name, as the parameters that they are."""
        return dict(self._named)

    def named(self) -> dict[str, Tensor]:
        """The trainable tensors by peft name; these are the tensors themselves, not copies."""
        return dict(self._named)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the masters."""
        return self.parameters()[0].dtype

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace every tensor; nothing changes unless all of them fit.

        Raises ``InvalidRequestError`` when the set of names, a shape, a kind of number or a value is wrong.
        """
        check_tensors(tensors, self._named, field="tensors")
        self.replace(tensors)

    @torch.no_grad()
    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace every tensor by one that is known to fit; that needs no memory."""
        for name, parameter in self._named.items():
            parameter.copy_(tensors[name])

    @torch.no_grad()
    def snapshot(self) -> FrozenAdapter:
        """Copy the tensors as they are now, in the dtype that the base model computes in."""
        layers = {
            name: (a.detach().to(self._compute_dtype, copy=True), b.detach().to(self._compute_dtype, copy=True))
            for name, (a, b) in self.layers.items()
        }
        saved = {name: value.detach().to(self._compute_dtype, copy=True) for name, value in self.saved.items()}
        return FrozenAdapter(self.spec, self.spec.scale, layers, saved)


@attrs.frozen(eq=False)
class FrozenAdapter:
    """An adapter that no longer changes: what samplers decode with and what is published."""

    spec: AdapterSpec
    scale: float
    layers: Mapping[str, tuple[Tensor, Tensor]]  # layer name -> (A (rank, in), B (out, rank))
    saved: Mapping[str, Tensor] = attrs.field(factory=dict[str, Tensor])  # parameter name -> what stands in its place

    def named(self) -> dict[str, Tensor]:
        """The tensors by peft name."""
        return _peft_named(self.layers, self.saved)


def layer_names(base: BaseModel, target_modules: tuple[str, ...] | None) -> list[str]:
    """Name the layers that an adapter covers, as peft would choose them, sorted.

    Raises ``InvalidRequestError`` when a target matches no linear layer, or the model has none.
    """
    layers = layers_of(base.model)
    if target_modules is None:
        head = cast("nn.Module | None", base.model.get_output_embeddings())
        names = [name for name, layer in layers.items() if layer is not head]
        require(bool(names), "target_modules", "a model with linear layers", base.name)
        return sorted(names)
    problems = [target for target in target_modules if not any(matches(name, target) for name in layers)]
    if problems or not target_modules:
        suffixes = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        message = f"target_modules {problems} match no linear layer of {base.name}; it has: {suffixes}"
        raise InvalidRequestError(message, field="target_modules", constraint=f"names among: {suffixes}")
    return sorted(name for name in layers if any(matches(name, target) for target in target_modules))


def create(base: BaseModel, spec: AdapterSpec) -> Adapter:
    """Make a fresh adapter: A Kaiming-uniform as peft draws it, B zero, from ``spec.seed`` alone.

    Modules to save begin as they are in the base model. Raises ``InvalidRequestError`` when a module does not exist.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    dtype = torch.promote_types(base.dtype, torch.float32)  # fp32 masters; float64 only above a float64 base
    layers: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name in layer_names(base, spec.target_modules):
        linear = layers_of(base.model)[name]
        a = torch.empty(spec.rank, linear.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(linear.out_features, spec.rank)
        layers[name] = (nn.Parameter(a.to(base.device, dtype)), nn.Parameter(b.to(base.device, dtype)))
    saved = saved_modules.copies(base.model, spec.modules_to_save, adapted=layers, dtype=dtype)
    return Adapter(spec, layers, saved, base.dtype)


@contextmanager
def active(
    base: BaseModel,
    adapter: Adapter | FrozenAdapter | None,
    *,
    dropout_seed: int | RowSeeds | None = None,
    recorder: GradientRecorder | None = None,
) -> Generator[None]:
    """Bind ``adapter`` for the passes inside the block; ``None`` means the base model alone.

    ``dropout_seed`` turns dropout on and fixes it. ``recorder`` receives the per-example factors of the gradients, and
    ``grad`` then stays as it is. Backward belongs inside the same block, because checkpointing runs forward again.
    """
    saved = {} if adapter is None else {name: value.to(base.dtype) for name, value in adapter.saved.items()}
    layers = layers_of(base.model)
    before = {name: layer.binding for name, layer in layers.items() if layer.binding is not None}
    for name in before:
        layers[name].binding = None
    try:
        if adapter is not None:
            spec = adapter.spec
            for name, (a, b) in adapter.layers.items():
                layers[name].binding = Binding(a, b, spec.scale, spec.dropout, dropout_seed, recorder)
        with saved_modules.in_place(base.model, saved):
            yield
    finally:
        for name in () if adapter is None else adapter.layers:
            layers[name].binding = None
        for name, binding in before.items():
            layers[name].binding = binding


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, field: str, same_dtype: bool = False
) -> None:
    """Compare names, shapes, dtypes and finiteness with what is expected, and report every difference.

    Raises ``InvalidRequestError`` with one problem per wrong tensor.
    """
    problems = [f"missing @ $.{name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected @ $.{name}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        tensor, wanted = tensors[name], expected[name]
        if tensor.shape != wanted.shape:
            problems.append(f"shape {tuple(tensor.shape)} instead of {tuple(wanted.shape)} @ $.{name}")
        elif not tensor.is_floating_point() or (same_dtype and tensor.dtype != wanted.dtype):
            problems.append(f"dtype {tensor.dtype} instead of {wanted.dtype} @ $.{name}")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"a value that is not finite @ $.{name}")
    if problems:
        message = f"the tensors do not fit: {min(problems)} ({len(problems)} in all)"
        constraint = "the same names and shapes, finite values"
        raise InvalidRequestError(message, field=field, constraint=constraint, problems=sorted(problems))


def _peft_named(layers: Mapping[str, tuple[T, T]], saved: Mapping[str, T]) -> dict[str, T]:
    """Name every tensor as peft does, in the order of the names."""
    pairs = {f"{_PREFIX}{name}": value for name, value in saved.items()}
    for name, (a, b) in layers.items():
        pairs |= {f"{_PREFIX}{name}.lora_A.weight": a, f"{_PREFIX}{name}.lora_B.weight": b}
    return dict(sorted(pairs.items()))
