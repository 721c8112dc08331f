"""What a TG training run is made of: model, adapter, optimizer, privacy.

Every field is checked at construction with the ranges of the TG-Tinker pages (configuration), so a typo costs no
training run. Whether a model exists or a device can do fp16 is the server's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import checks
from tg_tinker.types.value import Input, Value

OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ACCOUNTANTS = ("rdp", "moments", "gdp", "prv")

#: fields that not every optimizer reads -> those that do
_READ_BY = {"betas": ("adamw", "adam"), "eps": ("adamw", "adam"), "momentum": ("sgd",)}
_MOST_NAMES = 1000  # of modules: each is looked for in the whole model
_MOST_ROWS = 10**9  # and as many batches: their product is a number that JSON can hold
_WITH_CYCLES = ("cosine", "cosine_with_restarts")


@attrs.frozen(kw_only=True)
class LoRAConfig(Input):
    """The low-rank adapter that is trained (Hu et al. 2021, arXiv:2106.09685).

    ``alpha / rank`` scales the update. ``target_modules`` are layer-name endings; each must match at least one layer.
    ``modules_to_save`` are names, or their endings at a dot, of modules that are trained whole beside the adapter
    (``"lm_head"``, ``"embed_tokens"``, ``"model.norm"``). None of them may hold an adapted layer, weights that the
    model ties come apart, and differential privacy refuses them. A ``bias`` other than "none" is refused by the server.
    """

    rank: int = attrs.field(default=16, validator=checks.integer(1, 512))
    alpha: float = attrs.field(default=32.0, validator=checks.number(1.0))
    dropout: float = attrs.field(default=0.05, validator=checks.number(0.0, below=1.0))
    target_modules: tuple[str, ...] = attrs.field(
        default=("q_proj", "v_proj", "k_proj", "o_proj"),
        converter=checks.tupled,
        validator=checks.texts(most=_MOST_NAMES),
    )
    bias: str = attrs.field(default="none", validator=checks.choice("none", "all", "lora_only"))
    modules_to_save: tuple[str, ...] = attrs.field(
        default=(), converter=checks.tupled, validator=checks.texts(empty=True, most=_MOST_NAMES)
    )


def _lowered(name: Any) -> Any:
    return name.lower() if isinstance(name, str) else name


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _two_decay_rates(_: object, __: object, value: Any) -> None:
    good = isinstance(value, tuple) and len(value) == 2 and all(checks.finite(beta) for beta in value)
    if not good or not all(0.0 <= beta < 1.0 for beta in value):
        raise checks.refuse("betas", "two numbers from 0 up to, not including, 1", value)


@attrs.frozen(kw_only=True)
class OptimizerConfig(Input):
    """The optimizer and its learning-rate schedule; ``warmup_steps`` rise linearly from 0.

    ``lr_scheduler_kwargs``: ``num_cycles`` for the cosine kinds. The decaying kinds need ``TrainingConfig.max_steps``.
    ``momentum`` is for "sgd" alone, ``betas`` and ``eps`` are for "adamw" and "adam": elsewhere they are refused.
    """

    name: str = attrs.field(
        default="adamw",
        converter=_lowered,
        validator=checks.choice(*OPTIMIZERS),
    )
    learning_rate: float = attrs.field(default=1e-4, validator=checks.number(above=0.0, high=1.0))
    weight_decay: float = attrs.field(default=0.01, validator=checks.number(0.0, 1.0))
    betas: tuple[float, float] = attrs.field(default=(0.9, 0.999), converter=checks.tupled, validator=_two_decay_rates)
    eps: float = attrs.field(default=1e-8, validator=checks.number(above=0.0))
    momentum: float = attrs.field(default=0.9, validator=checks.number(0.0, 1.0))
    warmup_steps: int = attrs.field(default=0, validator=checks.integer(0))
    lr_scheduler: str = attrs.field(default="constant", validator=checks.choice(*SCHEDULES))
    lr_scheduler_kwargs: dict[str, Any] = attrs.field(
        factory=dict, converter=_copied, validator=checks.instance(dict, "a dict")
    )

    def __attrs_post_init__(self) -> None:
        """Refuse what the chosen optimizer or schedule would not read: it would look as if it did something."""
        defaults = attrs.fields_dict(OptimizerConfig)
        for field, readers in _READ_BY.items():
            value = getattr(self, field)
            if self.name not in readers and value != defaults[field].default:
                raise checks.refuse(field, f"no value: {' and '.join(readers)} read it, {self.name} does not", value)
        _check_schedule(self.lr_scheduler, self.lr_scheduler_kwargs)


def _check_schedule(schedule: str, settings: Mapping[str, Any]) -> None:
    known = {"num_cycles"} if schedule in _WITH_CYCLES else set[str]()
    for name, value in settings.items():
        if name not in known:
            wanted = f"{' and '.join(known) or 'nothing'} alone for the {schedule} schedule"
            raise checks.refuse("lr_scheduler_kwargs", wanted, dict(settings))
        if not checks.finite(value) or value < 0:
            raise checks.refuse(f"lr_scheduler_kwargs.{name}", "a finite number of at least 0", value)


def _noise(_: object, __: object, value: Any) -> None:
    """No noise at all, or as much as accountants can compute with: their series overflow, or never end, beyond."""
    if not checks.finite(value) or not (value == 0 or 1e-6 <= value <= 1e6):
        raise checks.refuse("noise_multiplier", "0, or a finite number from 1e-06 to 1e+06", value)


@attrs.frozen(kw_only=True)
class DPConfig(Input):
    """Differential privacy for the run (DP-SGD, Abadi et al. 2016, arXiv:1607.00133).

    The unit that is protected is one row of a batch (on the Loops surface one datum). Once per optimizer step, noise of
    standard deviation ``noise_multiplier * max_grad_norm`` is added to the sum of the clipped per-example gradients.
    Privacy amplification is claimed only when declared, by ``sample_rate`` or ``dataset_size``: both promise Poisson
    sampling (``PoissonSampler`` draws such batches). ``expected_batch_size`` is the public number that the sum is
    divided by; the TG surface has a default, ``batch_size * gradient_accumulation_steps``. ``secure_mode`` asks for
    what is always done: noise of a cryptographic generator.
    """

    enabled: bool = attrs.field(default=True, validator=checks.flag())
    noise_multiplier: float = attrs.field(default=1.0, validator=_noise)
    max_grad_norm: float = attrs.field(default=1.0, validator=checks.number(above=0.0))
    target_epsilon: float | None = attrs.field(default=8.0, validator=checks.optional(checks.number(0.0)))
    target_delta: float = attrs.field(default=1e-5, validator=checks.number(above=0.0, high=1.0 - 1e-12))
    accountant_type: str = attrs.field(default="rdp", validator=checks.choice(*ACCOUNTANTS))
    secure_mode: bool = attrs.field(default=False, validator=checks.flag())
    expected_batch_size: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(1)))
    sample_rate: float | None = attrs.field(default=None, validator=checks.optional(checks.number(above=0.0, high=1.0)))
    dataset_size: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(1)))


@attrs.frozen(kw_only=True)
class SamplingConfig(Input, Value):
    """Sampling settings to keep beside a run: ``tc.sample(prompt, **config.to_dict())``; ``top_k=0`` is off."""

    max_tokens: int = attrs.field(default=128, validator=checks.integer(1, 4096))
    temperature: float = attrs.field(default=0.7, validator=checks.number(0.0, 2.0))
    top_p: float = attrs.field(default=0.9, validator=checks.number(above=0.0, high=1.0))
    top_k: int = attrs.field(default=50, validator=checks.integer(0))
    stop_sequences: tuple[str, ...] = attrs.field(
        default=(), converter=checks.tupled, validator=checks.texts(empty=True)
    )


def _lora(value: Any) -> LoRAConfig:
    return checks.nested(LoRAConfig, value, "lora_config")


def _optimizer(value: Any) -> OptimizerConfig:
    return OptimizerConfig() if value is None else checks.nested(OptimizerConfig, value, "optimizer")


def _dp(value: Any) -> DPConfig | None:
    return None if value is None else checks.nested(DPConfig, value, "dp_config")


@attrs.frozen(kw_only=True)
class TrainingConfig(Input):
    """Everything that defines a TG training run.

    ``model_ref`` is a hub id, a local folder, ``"tg-tinker/tiny"`` or ``"tg-tinker/smollm2-135m"``. ``max_steps`` ends
    the run: its status becomes "completed", training is refused, sampling and saving go on.
    ``batch_size`` and ``gradient_accumulation_steps`` only make the expected batch size under DP: a batch has the rows
    that it has, and gradients add up until ``optim_step``, whatever they say. Training rows of more tokens than
    ``max_sequence_length``, or than the model has positions, are refused, not cut. ``mixed_precision`` "auto" is fp32
    on a CPU and bf16 on a GPU. ``seed`` fixes adapter initialisation and dropout; None lets the server draw one. Nested
    configs may be given as dicts; an ``optimizer`` of None is the default one.

    Raises ``InvalidRequestError`` with ``field`` and ``constraint``.
    """

    model_ref: str = attrs.field(validator=checks.text())
    lora_config: LoRAConfig = attrs.field(factory=LoRAConfig, converter=_lora)
    optimizer: OptimizerConfig = attrs.field(factory=OptimizerConfig, converter=_optimizer)
    dp_config: DPConfig | None = attrs.field(default=None, converter=_dp)
    batch_size: int = attrs.field(default=8, validator=checks.integer(1, _MOST_ROWS))
    gradient_accumulation_steps: int = attrs.field(default=1, validator=checks.integer(1, _MOST_ROWS))
    max_steps: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(1)))
    max_sequence_length: int = attrs.field(default=2048, validator=checks.integer(1))
    mixed_precision: str = attrs.field(default="auto", validator=checks.choice(*PRECISIONS))
    gradient_checkpointing: bool = attrs.field(default=False, validator=checks.flag())
    metadata: dict[str, Any] = attrs.field(factory=dict, converter=_copied, validator=checks.json_object())
    seed: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(0, 2**63 - 1)))

    def __attrs_pre_init__(self, *args: object, **fields: object) -> None:
        """Refuse full fine-tuning by name: it would otherwise look like a forgotten argument."""
        if "lora_config" in fields and fields["lora_config"] is None:
            raise InvalidRequestError(
                "lora_config: None asks for full fine-tuning, which is not offered; give a LoRAConfig",
                field="lora_config",
                constraint="a LoRAConfig",
                problems=["expected a LoRAConfig, got None @ $.lora_config"],
            )

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot go together: decaying towards no end, and privacy for more than an adapter."""
        if self.optimizer.lr_scheduler != "constant" and self.max_steps is None:
            wanted = f"a number of steps, for the {self.optimizer.lr_scheduler} schedule to decay over"
            raise checks.refuse("max_steps", wanted, None)
        saved = self.lora_config.modules_to_save
        if saved and self.dp_config is not None and self.dp_config.enabled:
            wanted = "nothing under differential privacy: the gradients of adapters alone are clipped by example"
            raise checks.refuse("lora_config.modules_to_save", wanted, saved)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainingConfig:
        """Build a config from nested dicts; unknown fields are refused with the nearest known name."""
        if not isinstance(fields, Mapping):
            raise checks.refuse("config", "a TrainingConfig or a dict of its fields", fields)
        return checks.build(cls, fields)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainingConfig:
        """Build a config from a YAML file of the same nested fields; ``1e-4`` is a number, as in YAML 1.2."""
        from tg_tinker.types.yaml_file import read

        return cls.from_dict(read(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as ``from_dict`` takes them."""
        return attrs.asdict(self)
