"""TrainingConfig and what it holds: ranges, defaults, dicts, YAML, and the names that errors give."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.config import DPConfig, LoRAConfig, OptimizerConfig, SamplingConfig, TrainingConfig

WRONG: list[tuple[Callable[..., Any], str, Any]] = [
    (LoRAConfig, "rank", 0),
    (LoRAConfig, "rank", 513),
    (LoRAConfig, "rank", True),
    (LoRAConfig, "rank", "16"),
    (LoRAConfig, "alpha", 0.5),
    (LoRAConfig, "dropout", 1.5),
    (LoRAConfig, "dropout", 1.0),
    (LoRAConfig, "alpha", 10**400),
    (LoRAConfig, "dropout", float("nan")),
    (LoRAConfig, "target_modules", []),
    (LoRAConfig, "target_modules", "q_proj"),
    (LoRAConfig, "target_modules", [""]),
    (LoRAConfig, "bias", "zzz"),
    (OptimizerConfig, "name", "nope"),
    (OptimizerConfig, "learning_rate", 0.0),
    (OptimizerConfig, "learning_rate", -1e-3),
    (OptimizerConfig, "learning_rate", 1.5),
    (OptimizerConfig, "weight_decay", 2.0),
    (OptimizerConfig, "betas", (0.9,)),
    (OptimizerConfig, "betas", (0.9, 1.0)),
    (OptimizerConfig, "betas", (0.9, False)),
    (OptimizerConfig, "name", ["adam"]),
    (OptimizerConfig, "eps", 0.0),
    (OptimizerConfig, "warmup_steps", -1),
    (OptimizerConfig, "lr_scheduler", "exponential"),
    (partial(TrainingConfig, model_ref="m"), "batch_size", 10**9 + 1),
    (partial(TrainingConfig, model_ref="m"), "gradient_accumulation_steps", 10**9 + 1),
    (DPConfig, "enabled", "yes"),
    (DPConfig, "noise_multiplier", -0.1),
    (DPConfig, "noise_multiplier", 1e-7),
    (DPConfig, "noise_multiplier", 1e7),
    (DPConfig, "max_grad_norm", 0.0),
    (DPConfig, "target_epsilon", -1.0),
    (DPConfig, "target_delta", 0.0),
    (DPConfig, "target_delta", 1.0),
    (DPConfig, "accountant_type", "magic"),
    (DPConfig, "expected_batch_size", 0),
    (DPConfig, "sample_rate", 1.1),
    (DPConfig, "dataset_size", 0),
    (SamplingConfig, "max_tokens", 0),
    (SamplingConfig, "temperature", 2.1),
    (SamplingConfig, "top_p", 1.1),
    (SamplingConfig, "top_p", 0.0),
    (SamplingConfig, "top_k", -1),
]


@pytest.mark.parametrize(("kind", "field", "value"), WRONG, ids=lambda item: getattr(item, "__name__", repr(item)))
def test_a_value_out_of_range_is_refused_by_field(kind: Callable[..., Any], field: str, value: object) -> None:
    """Each config refuses a wrong value at construction and names the field and what was expected."""
    with pytest.raises(InvalidRequestError) as caught:
        kind(**{field: value})
    assert caught.value.field == field
    assert caught.value.constraint
    assert caught.value.problems[0].endswith(f"@ $.{field}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_ref", ""),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("max_steps", 0),
        ("max_sequence_length", 0),
        ("mixed_precision", "int4"),
        ("gradient_checkpointing", 1),
        ("seed", -1),
        ("seed", 2**63),
        ("lora_config", "rank 16"),
        ("dp_config", 8.0),
    ],
)
def test_a_training_config_checks_its_own_fields(field: str, value: object) -> None:
    """TrainingConfig refuses a wrong value of its own, by field."""
    with pytest.raises(InvalidRequestError) as caught:
        TrainingConfig(**{"model_ref": "m", field: value})
    assert caught.value.field == field


def test_the_defaults_are_those_of_the_pages() -> None:
    """A config made of a model alone carries the published defaults."""
    config = TrainingConfig(model_ref="m")
    assert (config.lora_config.rank, config.lora_config.alpha, config.lora_config.dropout) == (16, 32.0, 0.05)
    assert config.lora_config.target_modules == ("q_proj", "v_proj", "k_proj", "o_proj")
    assert (config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay) == (
        "adamw",
        1e-4,
        0.01,
    )
    assert (config.batch_size, config.max_steps, config.dp_config, config.seed) == (8, None, None, None)
    assert (DPConfig().enabled, DPConfig().target_epsilon, DPConfig().target_delta) == (True, 8.0, 1e-5)


def test_nested_dicts_become_configs() -> None:
    """``from_dict`` builds the nested configs, and ``to_dict`` gives dicts that build the same again."""
    fields = {
        "model_ref": "m",
        "lora_config": {"rank": 4, "target_modules": ["q_proj"]},
        "dp_config": {"target_epsilon": 3},
    }
    config = TrainingConfig.from_dict(fields)
    assert config.lora_config == LoRAConfig(rank=4, target_modules=("q_proj",))
    assert config.dp_config == DPConfig(target_epsilon=3)
    assert TrainingConfig.from_dict(config.to_dict()) == config


def test_no_optimizer_is_the_default_one() -> None:
    """The pages have None as the optimizer's default, and so has a YAML file with an empty line for it."""
    assert TrainingConfig(model_ref="m", optimizer=None) == TrainingConfig(model_ref="m")


def test_a_fault_inside_a_nested_dict_is_located() -> None:
    """The error of a nested field carries the whole path."""
    with pytest.raises(InvalidRequestError) as caught:
        TrainingConfig.from_dict({"model_ref": "m", "optimizer": {"learning_rate": "fast"}})
    assert caught.value.field == "optimizer.learning_rate"
    assert caught.value.problems[0].endswith("@ $.optimizer.learning_rate")


def test_an_unknown_field_names_its_nearest_neighbour() -> None:
    """A typo is answered with the name that was probably meant."""
    with pytest.raises(InvalidRequestError, match="did you mean 'learning_rate'"):
        TrainingConfig.from_dict({"model_ref": "m", "optimizer": {"learning_rat": 1e-3}})
    with pytest.raises(InvalidRequestError, match="did you mean 'lora_config'"):
        TrainingConfig.from_dict({"model_ref": "m", "lora_confg": {}})


def test_an_unknown_field_is_located_once() -> None:
    """The message and the field give the whole path, and the message names the class after it."""
    with pytest.raises(InvalidRequestError) as caught:
        TrainingConfig.from_dict({"model_ref": "m", "lora_config": {"rnk": 4}})
    error = caught.value
    assert error.message == "lora_config.rnk: no field of LoRAConfig; did you mean 'rank'?"
    assert error.field == "lora_config.rnk"
    assert list(error.problems) == ["no field of LoRAConfig; did you mean 'rank'? @ $.lora_config.rnk"]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts"])
def test_a_decaying_schedule_needs_an_end(schedule: str) -> None:
    """A schedule without ``max_steps`` to decay over is refused when the config is made, not at the first step."""
    with pytest.raises(InvalidRequestError) as caught:
        TrainingConfig(model_ref="m", optimizer={"lr_scheduler": schedule})
    assert caught.value.field == "max_steps"
    assert TrainingConfig(model_ref="m", max_steps=3, optimizer={"lr_scheduler": schedule}).max_steps == 3


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("adamw", "momentum", 0.5),
        ("adam", "momentum", 0.5),
        ("adafactor", "momentum", 0.5),
        ("adafactor", "betas", (0.8, 0.9)),
        ("adafactor", "eps", 1e-6),
        ("sgd", "betas", (0.8, 0.9)),
        ("sgd", "eps", 1e-6),
    ],
)
def test_what_the_optimizer_does_not_read_is_refused(name: str, field: str, value: Any) -> None:
    """A field that the chosen optimizer has no use for is an error, not a setting without effect."""
    with pytest.raises(InvalidRequestError, match=f"{name} does not") as caught:
        OptimizerConfig(name=name, **{field: value})
    assert caught.value.field == field
    reader = "sgd" if field == "momentum" else "adam"
    assert getattr(OptimizerConfig(name=reader, **{field: value}), field) == value


@pytest.mark.parametrize(
    ("schedule", "settings", "field"),
    [
        ("constant", {"num_cycles": 2}, "optimizer.lr_scheduler_kwargs"),
        ("linear", {"power": 2}, "optimizer.lr_scheduler_kwargs"),
        ("cosine", {"num_cycle": 2}, "optimizer.lr_scheduler_kwargs"),
        ("cosine", {"num_cycles": -1}, "optimizer.lr_scheduler_kwargs.num_cycles"),
        ("cosine_with_restarts", {"num_cycles": "3"}, "optimizer.lr_scheduler_kwargs.num_cycles"),
        ("cosine_with_restarts", {"num_cycles": float("nan")}, "optimizer.lr_scheduler_kwargs.num_cycles"),
    ],
)
def test_a_schedule_s_settings_are_checked_with_it(schedule: str, settings: dict[str, Any], field: str) -> None:
    """What a schedule does not know, or cannot use, is refused when the config is made, by the name it was given."""
    optimizer = {"lr_scheduler": schedule, "lr_scheduler_kwargs": settings}
    with pytest.raises(InvalidRequestError) as caught:
        TrainingConfig.from_dict({"model_ref": "m", "max_steps": 9, "optimizer": optimizer})
    assert caught.value.field == field
    assert OptimizerConfig(lr_scheduler="cosine", lr_scheduler_kwargs={"num_cycles": 2}).lr_scheduler_kwargs


def test_a_missing_model_is_named() -> None:
    """A config without its one required field says which one it is."""
    with pytest.raises(InvalidRequestError) as caught:
        TrainingConfig.from_dict({"batch_size": 4})
    assert caught.value.field == "model_ref"


def test_full_fine_tuning_is_refused_by_name() -> None:
    """``lora_config=None`` is an error that says why, not a default."""
    with pytest.raises(InvalidRequestError, match="full fine-tuning") as caught:
        TrainingConfig(model_ref="m", lora_config=None)
    assert caught.value.field == "lora_config"


def test_a_yaml_file_makes_the_same_config(tmp_path: Any) -> None:
    """``from_yaml`` reads the nested fields; a file that cannot be read is a typed error."""
    path = tmp_path / "run.yaml"
    path.write_text("model_ref: m\nlora_config:\n  rank: 4\noptimizer:\n  betas: [0.8, 0.9]\n", encoding="utf-8")
    config = TrainingConfig.from_yaml(path)
    assert config == TrainingConfig(
        model_ref="m", lora_config=LoRAConfig(rank=4), optimizer=OptimizerConfig(betas=(0.8, 0.9))
    )
    with pytest.raises(InvalidRequestError, match="cannot read"):
        TrainingConfig.from_yaml(tmp_path / "absent.yaml")
    for content in (b"a: [", "model_ref: caf\u00e9".encode("latin-1")):
        path.write_bytes(content)
        with pytest.raises(InvalidRequestError, match="cannot read") as caught:
            TrainingConfig.from_yaml(path)
        assert caught.value.field == "path"


@pytest.mark.parametrize("text", ["1e-4", "1E-04", "0.1e-3", ".1e-3", "1.e-4", "+1e-4", "100e-6", "0.0001"])
def test_a_number_in_yaml_is_one_however_it_is_written(tmp_path: Any, text: str) -> None:
    """``1e-4`` is a number, though the YAML of 2005 has it as a string; quoted it is a string, and is refused."""
    path = tmp_path / "run.yaml"
    path.write_text(f"model_ref: 1e-4m\noptimizer:\n  learning_rate: {text}\n", encoding="utf-8")
    config = TrainingConfig.from_yaml(path)
    assert (config.model_ref, config.optimizer.learning_rate) == ("1e-4m", pytest.approx(1e-4))
    path.write_text(f"model_ref: m\noptimizer:\n  learning_rate: '{text}'\n", encoding="utf-8")
    with pytest.raises(InvalidRequestError) as caught:
        TrainingConfig.from_yaml(path)
    assert caught.value.field == "optimizer.learning_rate"


def test_configs_are_frozen_and_pickle() -> None:
    """A config cannot be changed behind a run's back, and travels to another process."""
    config = TrainingConfig(model_ref="m", lora_config={"rank": 2})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        config.batch_size = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


@given(
    rank=st.integers(1, 512),
    alpha=st.floats(1.0, 1e6),
    learning_rate=st.floats(0.0, 1.0, exclude_min=True),
    epsilon=st.none() | st.floats(0.0, 100.0),
    seed=st.none() | st.integers(0, 2**63 - 1),
)
def test_every_valid_config_survives_its_dict(
    rank: int, alpha: float, learning_rate: float, epsilon: float | None, seed: int | None
) -> None:
    """Whatever is within the ranges is accepted and round-trips through plain dicts."""
    config = TrainingConfig(
        model_ref="m",
        lora_config=LoRAConfig(rank=rank, alpha=alpha),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        dp_config=DPConfig(target_epsilon=epsilon),
        seed=seed,
    )
    assert TrainingConfig.from_dict(config.to_dict()) == config
