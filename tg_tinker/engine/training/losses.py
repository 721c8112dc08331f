"""The losses, each a pure function of target logprobs, and the registry that names them.

Notation: x = log p of the target under the model (the only differentiated input), y = log q under the policy that
sampled it (input ``logprobs``), r = exp(x - y), A = ``advantages``, w = ``weights`` (1 where absent). A function gives
the loss of each token; masking, summing and dividing are not its business (see :func:`evaluate` and ``trainer``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from tg_tinker.types.batch import IGNORED
from tg_tinker.types.losses import LOSSES as SPECS
from tg_tinker.types.losses import LossSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tg_tinker.engine.training.batching import Row

__all__ = ["LOSSES", "Inputs", "Loss", "active_positions", "evaluate", "rl_metrics"]

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float | bool]
LossFunction = Callable[[Tensor, Inputs, Config], Tensor]

_MAX_LOG_RATIO = 20.0  # exp stays finite in fp32, and no real update lives beyond it


def cross_entropy(target_logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:  # noqa: ARG001 - the protocol
    """-w x: weighted negative log likelihood; with targets (N, K) each of the K has a weight of its own."""
    return -_weights(inputs) * target_logprobs


def importance_sampling(target_logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:  # noqa: ARG001
    """-w r A: policy gradient with importance weights (Williams 1992, doi:10.1007/BF00992696; off-policy form)."""
    return -_weights(inputs) * _ratio(target_logprobs, inputs) * inputs["advantages"]


def ppo(target_logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w min(r A, clip(r, low, high) A), clipping the ratio itself (Schulman et al. 2017, arXiv:1707.06347 eq. 7)."""
    ratio, advantages = _ratio(target_logprobs, inputs), inputs["advantages"]
    return -_weights(inputs) * torch.minimum(ratio * advantages, _clip(ratio, config) * advantages)


def cispo(target_logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w sg(clip(r, low, high)) A x: clipped weight, gradient never cut (MiniMax-M1, arXiv:2506.13585 eq. 4-5)."""
    clipped = _clip(_ratio(target_logprobs, inputs), config).detach()
    return -_weights(inputs) * clipped * inputs["advantages"] * target_logprobs


def dro(target_logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w (x A - beta/2 (x - y)^2): direct reward optimisation per token (Richemond et al. 2024, arXiv:2405.19107)."""
    drift = target_logprobs - inputs["logprobs"]
    return -_weights(inputs) * (target_logprobs * inputs["advantages"] - 0.5 * config["beta"] * drift.square())


def dppo(target_logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w (M adv_tau A r - kl_tau (x - y)^2): divergence PPO with the binary-TV mask M (arXiv:2602.04879 eq. 13).

    M drops the policy term where the probability already moved too far the advantage's way; the second term stays.
    """
    kept = ~_dppo_dropped(target_logprobs, inputs, config)
    policy = config["adv_tau"] * inputs["advantages"] * _ratio(target_logprobs, inputs)
    drift = (target_logprobs - inputs["logprobs"]).square()
    return -_weights(inputs) * (kept * policy - config["kl_tau"] * drift)


def dpo(target_logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-(1-s) log sigmoid(beta D) - s log sigmoid(-beta D), one value per pair (Rafailov et al. 2023, arXiv:2305.18290).

    D = sum w (x - ref) of the chosen row minus that of the rejected one. Rows alternate, and ``lengths`` counts the
    positions of each; s = ``label_smoothing``, the chance that a pair is the wrong way round.
    """
    gains = _weights(inputs) * (target_logprobs - inputs["ref_logprobs"])
    rows = torch.stack([part.sum() for part in gains.split(inputs["lengths"].tolist())])
    margin = config["beta"] * (rows[0::2] - rows[1::2])
    smoothing = config["label_smoothing"]
    return -(1.0 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


@attrs.frozen
class Loss:
    """One loss: what it needs, how it is computed, and what counts as a unit of its mean."""

    spec: LossSpec
    fn: LossFunction
    clipped: LossFunction | None = None  # where the update is cut off, for ``clip_fraction``

    @property
    def required_inputs(self) -> tuple[str, ...]:
        """The tensors that a row must carry; targets are always there."""
        return tuple(name for name in self.spec.required if name != "target_tokens")

    @property
    def input_names(self) -> tuple[str, ...]:
        """Every tensor that the loss reads."""
        return (*self.required_inputs, *(name for name in self.spec.optional if name != "target_tokens"))

    @property
    def is_rl(self) -> bool:
        """Whether it compares with a sampling policy."""
        return "advantages" in self.spec.required

    @property
    def rows_per_unit(self) -> int:
        """How many consecutive rows belong together: 2 for losses over pairs."""
        return 2 if self.fn is dpo else 1


def evaluate(loss: Loss, target_logprobs: Tensor, inputs: Inputs, config: Config, mask: Tensor) -> Tensor:
    """Compute the loss of each token, or pair, with masked positions out of every term; they may hold NaN.

    ``target_logprobs``, ``mask`` and every input but ``lengths`` are shaped (N,) or (N, K).
    """
    clean = {name: value if name == "lengths" else value.where(mask, 0.0) for name, value in inputs.items()}
    values = loss.fn(target_logprobs.where(mask, 0.0), clean, config)
    return values if loss.rows_per_unit > 1 else values.where(mask, 0.0)


def active_positions(loss: Loss, row: Row) -> NDArray[np.bool_]:
    """Say which targets of a row enter the loss, shaped like its targets.

    Out are: targets of -100, weights of 0, and for the RL losses advantages of 0 (prompts, by the Loops convention).
    """
    active: NDArray[np.bool_] = row.targets != IGNORED
    for name in ("weights", "advantages") if loss.is_rl else ("weights",):
        if name in row.inputs and name in loss.input_names:
            active = active & (row.inputs[name] != 0)
    return active


@torch.no_grad()
def rl_metrics(loss: Loss, target_logprobs: Tensor, inputs: Inputs, config: Config, mask: Tensor) -> dict[str, float]:
    """Sum the diagnostics of an RL loss over the unmasked tokens; the caller divides by their number.

    ``mismatch_kl`` is the k3 estimate of KL(q || p), r - 1 - log r (Schulman 2020); ``entropy`` is estimated by -x.
    """
    x = target_logprobs[mask]
    kept = {name: value[mask] for name, value in inputs.items() if name != "lengths"}
    log_ratio = _log_ratio(x, kept)
    sums = {
        "ratio_mean": log_ratio.exp().sum(),
        "mismatch_kl": (log_ratio.expm1() - log_ratio).sum(),
        "entropy": -x.sum(),
    }
    if loss.clipped is not None:
        sums["clip_fraction"] = loss.clipped(x, kept, config).sum()
    return {name: float(value) for name, value in sums.items()}


def _weights(inputs: Inputs) -> Tensor | float:
    return inputs.get("weights", 1.0)


def _log_ratio(x: Tensor, inputs: Inputs) -> Tensor:
    return (x - inputs["logprobs"]).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _ratio(x: Tensor, inputs: Inputs) -> Tensor:
    return _log_ratio(x, inputs).exp()


def _clip(ratio: Tensor, config: Config) -> Tensor:
    return ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])


def _ppo_clipped(x: Tensor, inputs: Inputs, config: Config) -> Tensor:
    ratio, advantages = _ratio(x, inputs), inputs["advantages"]
    too_high = (advantages > 0) & (ratio > config["clip_high_threshold"])
    return too_high | ((advantages < 0) & (ratio < config["clip_low_threshold"]))


def _cispo_clipped(x: Tensor, inputs: Inputs, config: Config) -> Tensor:
    ratio = _ratio(x, inputs)
    return ratio != _clip(ratio, config)


def _dppo_dropped(x: Tensor, inputs: Inputs, config: Config) -> Tensor:
    # Rounding can push a probability above one, and the mask compares differences of probabilities.
    moved = x.detach().exp().clamp(max=1.0) - inputs["logprobs"].exp().clamp(max=1.0)
    up = inputs["advantages"] > 0
    return (up & (moved > config["dppo_mask_high"])) | (~up & (moved < -config["dppo_mask_low"]))


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(SPECS["cross_entropy"], cross_entropy),
    "importance_sampling": Loss(SPECS["importance_sampling"], importance_sampling),
    "ppo": Loss(SPECS["ppo"], ppo, _ppo_clipped),
    "cispo": Loss(SPECS["cispo"], cispo, _cispo_clipped),
    "dro": Loss(SPECS["dro"], dro),
    "dppo": Loss(SPECS["dppo"], dppo, _dppo_dropped),
    "dpo": Loss(SPECS["dpo"], dpo),
}
