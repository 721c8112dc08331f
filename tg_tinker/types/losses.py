"""What each loss needs, as data: required tensors, optional tensors, config keys with their defaults.

The client checks a call against this table before it is sent; ``engine.training.losses`` computes by the same table.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import attrs

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import checks
from tg_tinker.types.batch import IGNORED
from tg_tinker.types.loops import Datum

_RL = ("target_tokens", "logprobs", "advantages")


@attrs.frozen
class LossSpec:
    """The inputs and settings of one loss; ``defaults`` names every config key it knows."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ("weights", "temperatures")
    defaults: Mapping[str, float | bool] = attrs.field(factory=dict)


LOSSES: Mapping[str, LossSpec] = {
    "cross_entropy": LossSpec((), ("target_tokens", "weights", "temperatures"), {"skip_token_normalization": False}),
    "importance_sampling": LossSpec(_RL),
    "ppo": LossSpec(_RL, defaults={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": LossSpec(_RL, defaults={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "dro": LossSpec(_RL, defaults={"beta": 0.05}),
    "dppo": LossSpec(_RL, defaults={"dppo_mask_high": 0.2, "dppo_mask_low": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3}),
    "dpo": LossSpec(
        ("target_tokens", "weights", "ref_logprobs"), ("temperatures",), {"beta": 0.1, "label_smoothing": 0.0}
    ),
}


_INPUTS = sorted({name for spec in LOSSES.values() for name in (*spec.required, *spec.optional)})
_ALIKE = 0.85  # of ``difflib``: "wieghts" is meant to be one of ours, "mask" is a column of the caller's own


def spec_of(loss_fn: object) -> LossSpec:
    """What a loss needs; raises ``InvalidRequestError`` for an unknown one."""
    if not isinstance(loss_fn, str) or loss_fn not in LOSSES:
        raise checks.refuse("loss_fn", f"one of {', '.join(LOSSES)}", loss_fn)
    return LOSSES[loss_fn]


def settings(loss_fn: object, config: object) -> dict[str, float | bool]:
    """The loss's config with defaults filled in; raises ``InvalidRequestError`` for unknown losses, keys and values."""
    spec = spec_of(loss_fn)
    if config is not None and not isinstance(config, Mapping):
        raise checks.refuse("loss_fn_config", "a dict of numbers", config)
    for key, value in (config or {}).items():
        allowed = ", ".join(spec.defaults) or "none"
        if key not in spec.defaults:
            raise checks.refuse(f"loss_fn_config.{key}", f"a key of {loss_fn} ({allowed})", key)
        flag = isinstance(spec.defaults[key], bool)
        if not (_is_flag(value) if flag else checks.finite(value)):
            raise checks.refuse(f"loss_fn_config.{key}", "True or False" if flag else "a finite number", value)
    return {**spec.defaults, **(config or {})}


def _is_flag(value: object) -> bool:
    """True and False, also as the numbers 1 and 0: Loops declares every setting a float."""
    return isinstance(value, int | float) and value in {0, 1}


def require_inputs(loss_fn: str, data: Sequence[Datum]) -> None:
    """Check that every datum carries what the loss needs; the error names datum and tensor.

    Inputs of other losses, and columns that no loss knows, are carried along; misspelt ones are refused.
    """
    spec = LOSSES[loss_fn]
    for index, datum in enumerate(data):
        for name in datum.loss_fn_inputs:
            near = () if name in _INPUTS else difflib.get_close_matches(name, _INPUTS, n=1, cutoff=_ALIKE)
            if near:
                raise checks.refuse(f"data[{index}].loss_fn_inputs.{name}", f"the name {near[0]!r}", name)
        missing = [name for name in spec.required if name not in datum.loss_fn_inputs]
        if missing:
            field = f"data[{index}].loss_fn_inputs.{missing[0]}"
            wanted = f"a tensor: {loss_fn} needs {', '.join(spec.required)}"
            raise checks.refuse(field, wanted, None)
    if loss_fn == "dpo" and len(data) % 2:
        raise InvalidRequestError(
            f"data: dpo takes pairs (chosen, rejected, chosen, ...), got {len(data)} datums",
            field="data",
            constraint="an even number of datums",
        )


def require_targets(data: Sequence[Datum]) -> None:
    """Refuse data in which there is nothing to predict; weights and advantages of 0 are an answer, and stay."""
    if not any(map(_has_target, data)):
        wanted, found = (
            f"a target other than {IGNORED} in at least one datum",
            data[0].loss_fn_inputs.get("target_tokens"),
        )
        raise checks.refuse("data[*].loss_fn_inputs.target_tokens", wanted, found)


def _has_target(datum: Datum) -> bool:
    targets = datum.loss_fn_inputs.get("target_tokens")
    return datum.model_input.length > 1 if targets is None else bool((targets.array != IGNORED).any())
