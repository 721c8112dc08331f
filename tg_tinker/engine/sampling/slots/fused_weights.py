"""The weights of a Llama, Mistral, Qwen2 or Qwen3 model as a decoder wants them: fewer and larger matrices.

Query, key and value become one matrix, gate and up another. The memory is shared: the model's own parameters become
views of the fused matrices, so nothing is stored twice and the model computes what it did before.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import Tensor, nn

from tg_tinker.engine.sampling.slots import quick_ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

__all__ = ["DecoderWeights", "LayerWeights", "Projection", "read", "unsupported"]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROTARY = ("default", "linear", "llama3", "yarn")  # those whose angles depend on the position alone


@attrs.frozen(eq=False)
class Projection:
    """One matrix product that stands for one or several linear layers side by side."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    parts: tuple[tuple[str, int, int], ...]  # layer name, first and last + 1 of its rows

    def __call__(self, x: Tensor) -> Tensor:
        """Apply: (N, in) -> (N, out)."""
        product = quick_ops.linear(x, self.weight)
        return product if self.bias is None else product.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """Add the product of ``x`` (N, in) to ``residual`` (N, out) in place."""
        residual.add_(quick_ops.linear(x, self.weight))
        if self.bias is not None:
            residual.add_(self.bias)


@attrs.frozen(eq=False)
class LayerWeights:
    """One decoder layer."""

    attention_norm: Tensor  # (hidden,)
    qkv: Projection
    head_norm: Tensor | None  # (query heads + key heads, head size): Qwen3 only
    attention_out: Projection
    mlp_norm: Tensor  # (hidden,)
    gate_up: Projection
    down: Projection

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """Those that an adapter may cover, in the order in which they are applied."""
        return self.qkv, self.attention_out, self.gate_up, self.down


@attrs.frozen(eq=False)
class DecoderWeights:
    """The whole model."""

    embedding: Tensor  # (vocabulary, hidden)
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # (hidden,)
    head: Projection
    rotary: nn.Module
    epsilon: float
    query_heads: int
    key_heads: int
    head_size: int

    @property
    def projections(self) -> list[Projection]:
        """Every matrix that an adapter may cover: four a layer, then the output head."""
        return [projection for layer in self.layers for projection in layer.projections] + [self.head]


def unsupported(model: PreTrainedModel) -> str | None:
    """Say why this model cannot be decoded here, or None where it can."""
    config: Any = model.config
    if config.model_type not in _FAMILIES:
        return f"the architecture {config.model_type!r} is none of {', '.join(_FAMILIES)}"
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        return f"the activation {config.hidden_act!r} is not silu"
    layers = getattr(config, "layer_types", None) or ()
    window = None if layers else getattr(config, "sliding_window", None)
    if window is not None or any(kind != "full_attention" for kind in layers):
        return "some layers attend to a sliding window"
    rotary = getattr(config, "rope_parameters", None) or {}
    kind = rotary.get("rope_type", "default")
    if kind not in _ROTARY or rotary.get("partial_rotary_factor", 1.0) != 1.0:
        return f"the rotary embedding {kind!r} depends on more than the position"
    return None


def read(model: PreTrainedModel, *, in_place: bool = True) -> DecoderWeights:
    """Collect the weights of ``model``, fusing them in place; doing it twice changes nothing.

    Not ``in_place``, the model is left alone, and what does not lie together in memory is copied.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    if in_place:
        for layer in cast("Any", model).model.layers:
            _fuse(_qkv(layer))
            _fuse(_gate_up(layer))
    body, config = cast("Any", model).model, cast("Any", model.config)
    return DecoderWeights(
        embedding=body.embed_tokens.weight,
        layers=tuple(_layer(layer, names) for layer in body.layers),
        norm=body.norm.weight,
        head=_projection([cast("nn.Linear", model.get_output_embeddings())], names),
        rotary=body.rotary_emb,
        epsilon=config.rms_norm_eps,
        query_heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=body.layers[0].self_attn.head_dim,
    )


def _qkv(layer: Any) -> list[nn.Linear]:
    return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


def _gate_up(layer: Any) -> list[nn.Linear]:
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


def _layer(layer: Any, names: dict[nn.Module, str]) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight,
        qkv=_projection(_qkv(layer), names),
        head_norm=_head_norm(attention),
        attention_out=_projection([attention.o_proj], names),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_projection(_gate_up(layer), names),
        down=_projection([mlp.down_proj], names),
    )


def _head_norm(attention: Any) -> Tensor | None:
    if not hasattr(attention, "q_norm"):
        return None
    size = attention.head_dim
    heads = [attention.q_proj.out_features // size, attention.k_proj.out_features // size]
    pairs = zip((attention.q_norm, attention.k_norm), heads, strict=True)
    return torch.cat([norm.weight.detach().expand(count, size) for norm, count in pairs])


def _projection(linears: Sequence[nn.Linear], names: dict[nn.Module, str]) -> Projection:
    parts: list[tuple[str, int, int]] = []
    row = 0
    for linear in linears:
        parts.append((names[linear], row, row + linear.out_features))
        row += linear.out_features
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return Projection(
        _joined([linear.weight.detach() for linear in linears]), torch.cat(biases) if biases else None, tuple(parts)
    )


@torch.no_grad()
def _fuse(linears: Sequence[nn.Linear]) -> None:
    """Put the weights below one another in one block of memory, and leave the layers as views of it."""
    weights = [linear.weight for linear in linears]
    if _adjacent(weights):
        return
    row = 0
    block = torch.cat(weights)
    for weight in weights:
        weight.data = block[row : row + weight.shape[0]]
        row += weight.shape[0]


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """Give weights below one another: where they lie so, without a copy."""
    if len(weights) == 1:
        return weights[0]
    if not _adjacent(weights):
        return torch.cat(list(weights))
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    return weights[0].as_strided(shape, weights[0].stride())


def _adjacent(weights: Sequence[Tensor]) -> bool:
    """Whether the weights lie behind one another in the same block of memory."""
    return all(weight.is_contiguous() for weight in weights) and all(
        one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
        and two.storage_offset() == one.storage_offset() + one.numel()
        for one, two in pairwise(weights)
    )
