"""The state of one run as named tensors and JSON counters: enough to continue it bit for bit.

Adapter tensors carry their peft names, moments ``exp_avg.<name>`` and so on, a gradient that was gathered and not yet
stepped with ``grad.<name>``. Sealing and storing them is not done here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from tg_tinker.engine.lora.adapters import check_tensors
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tg_tinker.engine.training.trainer import Trainer

__all__ = ["TrainerState", "load", "save"]

_FORMAT = "tg-trainer/1"


@attrs.frozen(eq=False)
class TrainerState:
    """Everything that one run is, apart from its base model."""

    tensors: Mapping[str, Tensor]  # on the CPU
    counters: Mapping[str, Any]  # JSON


def save(trainer: Trainer, *, include_optimizer: bool) -> TrainerState:
    """Copy the state of ``trainer``."""
    tensors = dict(trainer.adapter.named())
    counters: dict[str, Any] = {
        "format": _FORMAT,
        "step": trainer.step,
        "spec": attrs.asdict(trainer.adapter.spec),
        "base_model": trainer.base.name,
        "made_with": _circumstances(trainer),
    }
    if include_optimizer:
        tensors |= trainer.optimizer.tensors() | trainer.gradients.tensors()
        counters |= {
            "seed": trainer.seed,
            "dropout_counter": trainer.dropout_counter,
            "optimizer": trainer.optimizer.counters(),
            "gradients": trainer.gradients.counters(),
        }
    return TrainerState({name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}, counters)


def load(trainer: Trainer, state: TrainerState, *, with_optimizer: bool) -> tuple[str, ...]:
    """Put ``state`` into ``trainer``, and name the circumstances that differ.

    Raises ``InvalidRequestError`` when the state does not fit. Whatever is raised comes before anything changes.
    """
    counters = state.counters
    _check_counters(trainer, counters, with_optimizer=with_optimizer)
    own = trainer.adapter.named()
    adapter = {name: value for name, value in state.tensors.items() if name.startswith("base_model.")}
    gradients = {name: value for name, value in state.tensors.items() if name.startswith("grad.")}
    moments = {name: value for name, value in state.tensors.items() if name not in adapter and name not in gradients}
    if adapter.keys() != own.keys():
        _check_spec(trainer, counters, "target_modules", "modules_to_save")
    check_tensors(adapter, own, field="state", same_dtype=True)
    if with_optimizer:
        trainer.gradients.check(gradients, counters["gradients"])
        sums = {name: value.to(trainer.base.device, copy=True) for name, value in gradients.items()}
        trainer.optimizer.load(moments, counters["optimizer"])  # the last that needs memory
        trainer.gradients.load(sums, counters["gradients"])
        trainer.seed, trainer.dropout_counter = counters["seed"], counters["dropout_counter"]
    else:
        trainer.optimizer.reset()
        trainer.discard_gradients()
        trainer.dropout_counter = 0
    trainer.adapter.replace(adapter)
    trainer.step = counters["step"]
    then, now = counters["made_with"], _circumstances(trainer)
    return tuple(f"{key}: {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key])


def _check_counters(trainer: Trainer, counters: Mapping[str, Any], *, with_optimizer: bool) -> None:
    if counters.get("format") != _FORMAT:
        raise _unfit("format", _FORMAT, counters.get("format"))
    _check_spec(trainer, counters, "rank", "alpha")
    if with_optimizer and "optimizer" not in counters:
        raise _unfit("optimizer", "a state that was saved with its optimizer", None)


def _check_spec(trainer: Trainer, counters: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        then, now = (_as_json(value) for value in (counters["spec"].get(key), getattr(trainer.adapter.spec, key)))
        if then != now:
            raise _unfit(f"spec.{key}", f"this run's {key}, {now}", then)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _circumstances(trainer: Trainer) -> dict[str, Any]:
    """What bits depend on beside the state itself."""
    base = trainer.base
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type,
        "threads": torch.get_num_threads() if base.device.type == "cpu" else 0,
        "dtype": str(base.dtype).removeprefix("torch."),
        "base_model": base.digest,
        "dropout": trainer.adapter.spec.dropout,
        "micro_batch_tokens": trainer.micro_batch_tokens,
        "gradient_checkpointing": trainer.gradient_checkpointing,
    }


def _unfit(field: str, constraint: str, value: object) -> InvalidRequestError:
    message = f"the state does not fit this run: {field} is {value!r}, expected {constraint}"
    return InvalidRequestError(message, field=f"state.{field}", constraint=constraint)
