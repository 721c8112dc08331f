"""Per-example clipping against the vectors and against gradients taken one example at a time."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy.clipping import Clipped, ExampleClipper, clip_and_sum, example_gradients


@attrs.frozen(eq=False)
class Factors:
    """One layer's factors, as a recorder gets them."""

    inputs: Tensor
    hidden: Tensor
    hidden_grad: Tensor
    output_grad: Tensor
    scale: float


def vector_factors(vectors: dict[str, Any], rows: slice = slice(None)) -> Factors:
    """Compute the factors of the vectors' layer: y = x W' + scale (x A') B', loss = sum of squared errors."""
    weight, a, b, x, y = (torch.tensor(vectors[name], dtype=torch.float64) for name in ("W", "A", "B", "x", "y"))
    x, y, scale = x[rows], y[rows], vectors["lora_scale"]
    hidden = x @ a.T
    output_grad = 2 * (x @ weight.T + scale * hidden @ b.T - y)
    return Factors(x, hidden, scale * output_grad @ b, output_grad, scale)


def clip(factors: Factors, norm: float) -> Clipped:
    """Clip one layer."""
    clipper = ExampleClipper(len(factors.inputs), norm)
    clipper.record("layer", factors)
    return clipper.clip()


def close(got: Tensor, expected: Any, tolerance: float = 1e-9) -> bool:
    """Compare with a vector."""
    return torch.allclose(got, torch.tensor(expected, dtype=got.dtype), rtol=tolerance, atol=tolerance)


def test_clipping_equals_the_vectors(clip_vectors: dict[str, Any]) -> None:
    """Norms, factors, counts and clipped sums are those of tests/vectors/dp_clip_vectors.json."""
    factors = vector_factors(clip_vectors)
    for case in clip_vectors["cases"]:
        clipped = clip(factors, case["max_grad_norm"])
        assert close(clipped.norms, clip_vectors["per_example_grad_norm"])
        assert close(clipped.factors, case["clip_factor"])
        assert close(clipped.norms * clipped.factors, case["norms_after_clip"])
        assert clipped.num_clipped == case["num_clipped"]
        assert close(clipped.sums["layer"][0], case["sum_A"])
        assert close(clipped.sums["layer"][1], case["sum_B"])


def test_a_large_bound_clips_nothing(clip_vectors: dict[str, Any]) -> None:
    """With a bound above every norm the sums are the plain gradients."""
    clipped = clip(vector_factors(clip_vectors), 1e9)
    assert clipped.num_clipped == 0
    assert close(clipped.sums["layer"][0], clip_vectors["unclipped_sum_A"])
    assert close(clipped.sums["layer"][1], clip_vectors["unclipped_sum_B"])


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2, 3, 4), (3, 4)])
def test_any_split_gives_the_same_sums(clip_vectors: dict[str, Any], cuts: tuple[int, ...]) -> None:
    """Examples spread over several passes add up to the sums of one pass, within 1e-12."""
    whole = clip(vector_factors(clip_vectors), 0.5)
    bounds = [0, *cuts, 5]
    parts = [clip(vector_factors(clip_vectors, slice(*ends)), 0.5) for ends in itertools.pairwise(bounds)]
    for side in (0, 1):
        total = torch.stack([part.sums["layer"][side] for part in parts]).sum(0)
        assert torch.allclose(total, whole.sums["layer"][side], rtol=0, atol=1e-12)


def random_factors(seed: int, examples: int = 6, tokens: int = 5) -> Factors:
    """Draw factors of a layer (in 4, rank 2, out 3)."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((examples, tokens, width) for width in (4, 2, 2, 3))
    return Factors(*(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes), scale=0.5)


def test_all_layers_are_clipped_together() -> None:
    """The norm is taken over every tensor of every layer, and no example's total exceeds the bound."""
    layers = {f"layer{seed}": random_factors(seed) for seed in range(3)}
    gradients = {name: example_gradients(factors) for name, factors in layers.items()}
    clipped = clip_and_sum(gradients, 2.0)
    flat = torch.cat([tensor.flatten(1) for pair in gradients.values() for tensor in pair], dim=1)
    assert torch.allclose(clipped.norms, flat.norm(dim=1))
    expected = (flat * (2.0 / flat.norm(dim=1)).clamp(max=1)[:, None]).sum(0)
    got = torch.cat([tensor.flatten() for a, b in clipped.sums.values() for tensor in (a, b.t())])
    assert torch.allclose(got, expected)


def test_one_example_moves_the_sum_by_at_most_the_bound() -> None:
    """Leaving any one example out changes the joint sum by no more than the clipping norm: that is the sensitivity."""
    factors = random_factors(1)
    bound = 0.7
    whole = clip(factors, bound)
    for gone in range(6):
        kept = [index for index in range(6) if index != gone]
        parts = [tensor[kept] for tensor in (factors.inputs, factors.hidden, factors.hidden_grad, factors.output_grad)]
        rest = clip(Factors(*parts, factors.scale), bound)
        moved = torch.cat(
            [(one - other).flatten() for one, other in zip(whole.sums["layer"], rest.sums["layer"], strict=True)]
        )
        assert moved.norm() <= bound * (1 + 1e-12)


def test_a_layer_used_twice_adds_up_before_the_norm() -> None:
    """Two uses of one layer are one gradient per example."""
    first, second = random_factors(1), random_factors(2)
    clipper = ExampleClipper(6, 1.5)
    clipper.record("tied", first)
    clipper.record("tied", second)
    clipped = clipper.clip()
    pairs = [example_gradients(factors) for factors in (first, second)]
    summed = tuple(one + other for one, other in zip(*pairs, strict=True))
    expected = clip_and_sum({"tied": (summed[0], summed[1])}, 1.5)
    assert torch.equal(clipped.norms, expected.norms)
    assert torch.equal(clipped.sums["tied"][0], expected.sums["tied"][0])


def test_weights_apply_before_clipping() -> None:
    """A weight of 1/n turns the gradient of a summed loss into that of a mean loss, and that is what is clipped."""
    factors = random_factors(3)
    weights = torch.tensor([1.0, 0.5, 0.25, 2.0, 0.1, 1.0])
    clipped = clip_and_sum({"layer": example_gradients(factors)}, 1.0, weights)
    scaled = attrs.evolve(
        factors,
        hidden_grad=factors.hidden_grad * weights[:, None, None],
        output_grad=factors.output_grad * weights[:, None, None],
    )
    expected = clip_and_sum({"layer": example_gradients(scaled)}, 1.0)
    assert torch.allclose(clipped.norms, expected.norms)
    assert torch.allclose(clipped.sums["layer"][1], expected.sums["layer"][1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_an_example_that_is_not_finite_contributes_nothing(value: float) -> None:
    """One broken example neither poisons the sum nor shows in it; the others are as without it."""
    factors = random_factors(4)
    broken = factors.output_grad.clone()
    broken[2, 0, 0] = value
    clipped = clip(attrs.evolve(factors, output_grad=broken.float().double()), 1.0)
    kept = [0, 1, 3, 4, 5]
    parts = [tensor[kept] for tensor in (factors.inputs, factors.hidden, factors.hidden_grad, broken.float().double())]
    expected = clip(Factors(*parts, factors.scale), 1.0)
    assert clipped.num_dropped == 1
    assert torch.allclose(clipped.sums["layer"][1], expected.sums["layer"][1], rtol=1e-12)
    assert torch.allclose(clipped.sums["layer"][0], expected.sums["layer"][0], rtol=1e-12)


def test_a_zero_gradient_is_left_alone() -> None:
    """An example without gradient has norm 0, is not clipped, and divides nothing by zero."""
    factors = random_factors(5)
    zero = [tensor.clone() for tensor in (factors.hidden_grad, factors.output_grad)]
    for tensor in zero:
        tensor[1] = 0.0
    clipped = clip(attrs.evolve(factors, hidden_grad=zero[0], output_grad=zero[1]), 1e-3)
    assert clipped.norms[1] == 0.0
    assert clipped.factors[1] == 1.0
    assert clipped.num_clipped == 5
    assert all(torch.isfinite(tensor).all() for tensor in clipped.sums["layer"])


def test_half_precision_is_summed_in_single() -> None:
    """With bfloat16 factors norms are taken of the very values that are added up, in float32."""
    factors = random_factors(6)
    half = Factors(
        *(t.bfloat16() for t in (factors.inputs, factors.hidden, factors.hidden_grad, factors.output_grad)), 0.5
    )
    gradients = {"layer": example_gradients(half)}
    assert {tensor.dtype for tensor in gradients["layer"]} == {torch.float32}
    clipped = clip_and_sum(gradients, 0.1)
    for index in range(6):
        alone = torch.cat([tensor[index].flatten() for tensor in gradients["layer"]]).norm()
        assert torch.allclose(clipped.norms[index], alone)


@pytest.mark.parametrize("shape", [(30, 4), (5, 6, 4), (2, 3, 5, 4)])
def test_a_layer_that_mixes_examples_is_refused(shape: tuple[int, ...]) -> None:
    """A layer that does not see one example per row (mixtures of experts) is refused by name, not clipped wrongly."""
    inputs = torch.zeros(shape)
    factors = Factors(inputs, inputs, inputs, inputs, 1.0)
    with pytest.raises(InvalidRequestError, match="experts"):
        ExampleClipper(6, 1.0).record("experts.0", factors)
