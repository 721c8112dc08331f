"""The optimizer of one run: settings come with every step, the moments stay here and can be taken out.

The arithmetic is torch's (fused Adam and AdamW) and transformers' (Adafactor). Learning rates come from ``schedules``;
reducing and clipping gradients is the trainer's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tg_tinker.engine.lora.adapters import check_tensors
from tg_tinker.engine.requirements import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tg_tinker.engine.training.optimizer_settings import OptimizerSettings

__all__ = ["Optimizer"]


class Optimizer:
    """The moments of one run's parameters, and the step that uses them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self.reset()

    def __repr__(self) -> str:
        """Which optimizer is in use, and how many steps its moments hold."""
        return f"<Optimizer {self.name or 'unused'}, {self.steps} steps>"

    def reset(self) -> None:
        """Forget all moments."""
        self.name: str | None = None
        self.steps = 0
        self._engine: torch.optim.Optimizer | None = None

    def step(self, settings: OptimizerSettings, learning_rate: float) -> None:
        """Update every parameter from its ``grad``; another kind of optimizer than before starts from no moments."""
        if self._engine is None or self.name != settings.name:
            self.reset()
            self._engine, self.name = _ENGINES[settings.name](list(self._parameters.values())), settings.name
        for group in self._engine.param_groups:
            group.update(_hyperparameters(settings, learning_rate))
        self._engine.step()
        self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """The moments, as ``<kind>.<parameter name>``; these are the tensors themselves."""
        if self._engine is None:
            return {}
        return {
            f"{kind}.{name}": value
            for name, parameter in self._parameters.items()
            for kind, value in self._engine.state[parameter].items()
            if kind in _moments(cast("str", self.name), parameter) and value is not None
        }

    def counters(self) -> dict[str, Any]:
        """What is to be kept beside the moments."""
        kinds = sorted({key.partition(".")[0] for key in self.tensors()})
        return {"name": self.name, "steps": self.steps, "kinds": kinds}

    def load(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Continue from saved moments; nothing changes unless they fit.

        Raises ``InvalidRequestError`` when a tensor is missing, misshapen, of another dtype or not finite.
        """
        name, steps, kinds = counters.get("name"), counters.get("steps", 0), counters.get("kinds", [])
        if name is None:
            check_tensors(tensors, {}, field="optimizer")
            self.reset()
            return
        require(name in _ENGINES, "optimizer.name", f"one of {', '.join(_ENGINES)}", name)
        require(set(kinds) <= set(_KINDS[name]), "optimizer.kinds", f"among {_KINDS[name]}", kinds)
        kept = {
            key: {kind: value for kind, value in _moments(name, parameter).items() if kind in kinds}
            for key, parameter in self._parameters.items()
        }
        shapes = {f"{kind}.{key}": value for key, moments in kept.items() for kind, value in moments.items()}
        check_tensors(tensors, shapes, field="optimizer", same_dtype=True)
        engine = _ENGINES[name](list(self._parameters.values()))
        for key, parameter in self._parameters.items():
            moments = {kind: tensors[f"{kind}.{key}"].to(parameter.device, copy=True) for kind in kept[key]}
            engine.state[parameter] = {**moments, **_step_entries(name, steps, parameter)}
        self.name, self.steps, self._engine = name, steps, engine


def _hyperparameters(settings: OptimizerSettings, learning_rate: float) -> dict[str, Any]:
    common = {"lr": learning_rate, "weight_decay": settings.weight_decay}
    if settings.name in {"adamw", "adam"}:
        return {**common, "betas": settings.betas, "eps": settings.eps}
    return {**common, "momentum": settings.momentum} if settings.name == "sgd" else common


def _step_entries(name: str, steps: int, parameter: nn.Parameter) -> dict[str, Any]:
    """The step counter in the form that each implementation keeps it in."""
    if name in {"adamw", "adam"}:
        return {"step": torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)}
    return {"step": steps, "RMS": 0.0} if name == "adafactor" else {}


def _adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def _adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, fused=True)


def _sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def _adafactor(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Take the learning rate as given: no scaling by parameter size, no schedule inside (as the HF Trainer does)."""
    from transformers import Adafactor  # brings the whole trainer of transformers along

    return Adafactor(parameters, lr=0.0, scale_parameter=False, relative_step=False, warmup_init=False)


def _moments(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """Give what an optimizer may keep of a parameter, as tensors without data; Adafactor factors matrices alone."""
    shape = parameter.shape
    shapes = dict.fromkeys(_KINDS[name], shape)
    if name == "adafactor":
        rows, columns = {"exp_avg_sq_row": shape[:-1]}, {"exp_avg_sq_col": shape[:-2] + shape[-1:]}
        shapes = {**rows, **columns} if len(shape) > 1 else {"exp_avg_sq": shape}
    return {kind: parameter.new_empty(size, device="meta") for kind, size in shapes.items()}


_ENGINES: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "adafactor": _adafactor,
}
_KINDS = {
    "adamw": ["exp_avg", "exp_avg_sq"],
    "adam": ["exp_avg", "exp_avg_sq"],
    "sgd": ["momentum_buffer"],
    "adafactor": ["exp_avg_sq", "exp_avg_sq_col", "exp_avg_sq_row"],
}
