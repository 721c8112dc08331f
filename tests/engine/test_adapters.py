"""LoRA adapters against peft's own model, against finite differences, and beside each other on one base model."""

from __future__ import annotations

import copy

import attrs
import pytest
import torch
from fixtures.peft_oracle import peft_gradients, peft_model
from fixtures.training import stir, tiny
from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tg_tinker.engine.lora import adapters, lora_linear
from tg_tinker.engine.lora.adapters import Adapter, AdapterSpec, FrozenAdapter, active
from tg_tinker.engine.lora.lora_linear import GradientFactors, LoRALinear
from tg_tinker.engine.models import tiny as tiny_module
from tg_tinker.engine.models.base_model import BaseModel
from tg_tinker.engine.training.checkpointing import checkpointed
from tg_tinker.errors import InvalidRequestError

SPEC = AdapterSpec(rank=4, alpha=12.0, seed=3)
TOKENS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(5))


def logits(base: BaseModel, adapter: Adapter | FrozenAdapter | None, **settings) -> Tensor:
    """The logits of a few fixed rows with an adapter bound."""
    with active(base, adapter, **settings):
        return base.model(TOKENS).logits


def loss_gradients(base: BaseModel, adapter: Adapter, **settings) -> dict[str, Tensor]:
    """The gradients of a plain scalar of the logits."""
    with active(base, adapter, **settings):
        base.model(TOKENS).logits.log_softmax(-1)[..., 7].sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in adapter.parameter_dict().items()}
    for parameter in adapter.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize(
    ("targets", "saved"),
    [
        (None, ()),
        (("q_proj", "v_proj"), ()),
        (("model.layers.1.mlp.up_proj",), ()),
        (("lm_head", "o_proj"), ()),
        (("q_proj", "v_proj"), ("lm_head", "embed_tokens")),
        (("k_proj",), ("layers.0.mlp", "model.norm", "layers.1.input_layernorm")),
    ],
)
def test_forward_and_gradients_are_those_of_peft(targets: tuple[str, ...] | None, saved: tuple[str, ...]) -> None:
    """The same tensors in peft's own model give the same names, logits and gradients, whole modules included."""
    spec = attrs.evolve(SPEC, target_modules=targets, modules_to_save=saved)
    adapter = stir(adapters.create(tiny(), spec))
    oracle = peft_model(adapter)
    assert sorted(get_peft_model_state_dict(oracle, save_embedding_layers=False)) == list(adapter.named())
    expected = oracle(TOKENS).logits
    torch.testing.assert_close(logits(tiny(), adapter), expected, atol=1e-5, rtol=1e-5)
    expected.log_softmax(-1)[..., 7].sum().backward()
    theirs = peft_gradients(oracle)
    for name, gradient in loss_gradients(tiny(), adapter).items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5 * float(theirs[name].abs().max()), rtol=1e-5)


def _norm_in_float64(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    """Transformers computes norms in fp32 whatever the dtype, which is too coarse for difference quotients."""
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def test_gradients_are_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, every tensor's gradient along a random direction is the difference quotient."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", _norm_in_float64)
    base = tiny("float64")
    adapter = stir(adapters.create(base, SPEC))
    analytic = loss_gradients(base, adapter)
    generator = torch.Generator().manual_seed(11)
    for name, parameter in adapter.parameter_dict().items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(logits(base, adapter).log_softmax(-1)[..., 7].sum())
                parameter.sub_(direction, alpha=step)
        quotient = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((analytic[name] * direction).sum(), quotient, rtol=1e-6, atol=1e-6)


def test_a_fresh_adapter_changes_nothing_and_is_drawn_as_peft_draws_it() -> None:
    """B starts at zero, and A is uniform within one over the root of its inputs (Kaiming with a = sqrt(5))."""
    adapter = adapters.create(tiny(), SPEC)
    assert torch.equal(logits(tiny(), adapter), logits(tiny(), None))
    for a, b in adapter.layers.values():
        bound = a.shape[1] ** -0.5
        assert not b.any()
        assert 0.9 * bound < a.abs().max() <= bound
        assert float(a.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)


def test_a_seed_fixes_an_adapter() -> None:
    """Equal specs make equal adapters; another seed makes another one; the global random state is left alone."""
    before = torch.random.get_rng_state()
    one, same = adapters.create(tiny(), SPEC), adapters.create(tiny(), SPEC)
    other = adapters.create(tiny(), attrs.evolve(SPEC, seed=4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one.named()[name], same.named()[name]) for name in one.named())
    assert not torch.equal(one.parameters()[0], other.parameters()[0])


@pytest.mark.parametrize("saved", [(), ("lm_head", "model.norm")])
def test_adapters_on_one_base_do_not_meet(saved: tuple[str, ...]) -> None:
    """Each adapter's logits are its own, whatever was bound before or around it, and the base model stays itself."""
    whole = attrs.evolve(SPEC, target_modules=("q_proj",), modules_to_save=saved)
    one, two = (stir(adapters.create(tiny(), spec), seed) for seed, spec in ((1, whole), (2, SPEC)))
    plain, first = logits(tiny(), None), logits(tiny(), one)
    with active(tiny(), one):
        second = logits(tiny(), two)
        alone = logits(tiny(), None)
        again = tiny().model(TOKENS).logits
    assert torch.equal(first, again)
    assert torch.equal(plain, alone)
    assert torch.equal(plain, logits(tiny(), None))
    assert not torch.allclose(first, second)


def test_a_failure_inside_unbinds_the_adapter() -> None:
    """After an exception in the block the base model is bare again."""
    plain = logits(tiny(), None)
    with pytest.raises(KeyError), active(tiny(), stir(adapters.create(tiny(), SPEC))):
        raise KeyError
    assert torch.equal(plain, tiny().model(TOKENS).logits)


def test_a_snapshot_does_not_follow_its_adapter() -> None:
    """A frozen copy keeps the tensors of its moment, under the same names."""
    adapter = stir(adapters.create(tiny(), SPEC))
    frozen = adapter.snapshot()
    before = logits(tiny(), frozen)
    assert torch.equal(before, logits(tiny(), adapter))
    assert list(frozen.named()) == list(adapter.named())
    stir(adapter, seed=9)
    assert torch.equal(before, logits(tiny(), frozen))
    assert frozen.scale == 3.0


def test_dropout_is_a_function_of_its_seed() -> None:
    """One seed gives one set of masks, another seed another, and without a seed there is none."""
    adapter = stir(adapters.create(tiny(), attrs.evolve(SPEC, dropout=0.3)))
    undisturbed = logits(tiny(), stir(adapters.create(tiny(), SPEC)))
    once, twice, other = (logits(tiny(), adapter, dropout_seed=seed) for seed in (7, 7, 8))
    assert torch.equal(once, twice)
    assert not torch.equal(once, other)
    assert torch.equal(logits(tiny(), adapter), undisturbed)


def test_dropout_is_right_on_average_and_in_its_gradient() -> None:
    """Kept inputs are scaled up so that the mean output is that without dropout; the gradient has the same mask."""
    layer = LoRALinear(40, 3, bias=False, dtype=torch.float64)
    layer.layer_name, layer.layer_index = "layer", 0
    a = torch.nn.Parameter(torch.randn(2, 40, dtype=torch.float64))
    b = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    x = torch.randn(2000, 40, dtype=torch.float64, requires_grad=True)
    layer.weight.requires_grad_(False)

    def output(*tensors: Tensor) -> Tensor:
        layer.binding = adapters.Binding(tensors[1], tensors[2], 0.5, dropout=0.25, dropout_seed=1)
        return layer(tensors[0])

    branch = output(x, a, b) - x @ layer.weight.t()
    torch.testing.assert_close(branch.mean(0), 0.5 * (x @ a.t() @ b.t()).mean(0), atol=0.4, rtol=0.1)
    assert torch.autograd.gradcheck(output, (x[:4].detach().requires_grad_(), a, b))


def test_checkpointing_changes_no_bit() -> None:
    """Computing layers again in the backward pass gives the very same gradients, dropout included."""
    adapter = stir(adapters.create(tiny(), attrs.evolve(SPEC, dropout=0.2)))
    expected = loss_gradients(tiny(), adapter, dropout_seed=5)
    with checkpointed(tiny()):
        found = loss_gradients(tiny(), adapter, dropout_seed=5)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not tiny().model.model.layers[0].training


class PerExample:
    """A recorder that forms each example's own gradients."""

    def __init__(self, scale_check: float) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.calls = 0
        self._scale = scale_check

    def record(self, layer: str, factors: GradientFactors) -> None:
        self.calls += 1
        prefix = f"base_model.model.{layer}.lora_"
        assert factors.scale == pytest.approx(self._scale)
        self.gradients[f"{prefix}A.weight"] = torch.einsum("ntr,nti->nri", factors.hidden_grad, factors.inputs)
        b = torch.einsum("nto,ntr->nor", factors.output_grad, factors.hidden)
        self.gradients[f"{prefix}B.weight"] = factors.scale * b


@pytest.mark.parametrize("with_checkpoints", [False, True])
def test_recorded_factors_are_the_gradients_of_single_examples(with_checkpoints) -> None:
    """The recorder sees each layer once, its factors make each example's own gradient, and ``grad`` stays empty."""
    adapter = stir(adapters.create(tiny(), attrs.evolve(SPEC, dropout=0.25)))
    recorder = PerExample(3.0 / 0.75)
    with active(tiny(), adapter, dropout_seed=2, recorder=recorder):
        if with_checkpoints:
            with checkpointed(tiny()):
                tiny().model(TOKENS).logits.log_softmax(-1)[..., 7].sum().backward()
        else:
            tiny().model(TOKENS).logits.log_softmax(-1)[..., 7].sum().backward()
    assert recorder.calls == len(adapter.names)
    assert all(parameter.grad is None for parameter in adapter.parameters())
    for name, summed in loss_gradients(tiny(), adapter, dropout_seed=2).items():
        torch.testing.assert_close(recorder.gradients[name].sum(0), summed, atol=1e-4, rtol=1e-4)


def test_recorded_examples_are_those_of_single_rows() -> None:
    """Without dropout, an example's recorded gradient is the one that its row gives alone."""
    base = tiny("float64")
    adapter = stir(adapters.create(base, SPEC))
    recorder = PerExample(3.0)
    with active(base, adapter, recorder=recorder):
        base.model(TOKENS).logits.log_softmax(-1)[..., 7].sum().backward()
    for row in range(len(TOKENS)):
        with active(base, adapter):
            base.model(TOKENS[row : row + 1]).logits.log_softmax(-1)[..., 7].sum().backward()
        for name, parameter in adapter.parameter_dict().items():
            torch.testing.assert_close(recorder.gradients[name][row], parameter.grad)
            parameter.grad = None


def test_masters_are_fp32_above_a_bf16_base() -> None:
    """A bf16 base computes in bf16, while the adapter and its gradients stay fp32."""
    base = tiny("bfloat16")
    adapter = stir(adapters.create(base, SPEC))
    assert logits(base, adapter).dtype == torch.bfloat16
    gradients = loss_gradients(base, adapter)
    assert {tensor.dtype for tensor in (*adapter.parameters(), *gradients.values())} == {torch.float32}
    assert {a.dtype for a, _ in adapter.snapshot().layers.values()} == {torch.bfloat16}


@pytest.mark.parametrize("saved", [(), ("lm_head", "h.1.mlp.c_fc")])
def test_gpt2_is_adapted_as_peft_adapts_it(saved: tuple[str, ...]) -> None:
    """Its layers store their weights the other way round; logits and gradients are those of peft all the same."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=264, n_positions=64)).eval()
    other = copy.deepcopy(model)
    lora_linear.install(model.requires_grad_(False))
    base = attrs.evolve(tiny(), model=model)
    spec = attrs.evolve(SPEC, target_modules=("c_attn", "mlp.c_proj"), modules_to_save=saved)
    adapter = stir(adapters.create(base, spec))
    oracle = peft_model(adapter, other)
    expected = oracle(TOKENS).logits
    torch.testing.assert_close(logits(base, adapter), expected, atol=1e-5, rtol=1e-5)
    expected.log_softmax(-1)[..., 7].sum().backward()
    theirs = peft_gradients(oracle)
    for name, gradient in loss_gradients(base, adapter).items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5 * float(theirs[name].abs().max()), rtol=1e-4)
    assert "transformer.h.0.attn.c_proj" in adapters.layer_names(base, None)


def test_installing_twice_changes_nothing_and_keeps_the_weights() -> None:
    """Linear layers change their class only: same parameters, same names, tied ones still tied."""
    model = tiny_module.make_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    lora_linear.install(model)
    lora_linear.install(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert isinstance(model.lm_head, LoRALinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert list(model.state_dict()) == list(copy.deepcopy(model).state_dict())


def _missing(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _unexpected(tensors: dict[str, Tensor], name: str) -> None:
    tensors["other"] = tensors[name]


def _misshapen(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1]


def _not_finite(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name][0, 0] = float("nan")


def _whole_numbers(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].long()


@pytest.mark.parametrize("spoil", [_missing, _unexpected, _misshapen, _not_finite, _whole_numbers])
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(spoil) -> None:
    """Each kind of wrong tensor is named, and the adapter is as it was."""
    adapter = stir(adapters.create(tiny(), SPEC))
    before = {name: tensor.clone() for name, tensor in adapter.named().items()}
    wrong = {name: tensor.clone() for name, tensor in stir(adapters.create(tiny(), SPEC), seed=8).named().items()}
    name = next(iter(wrong))
    spoil(wrong, name)
    with pytest.raises(InvalidRequestError) as caught:
        adapter.load(wrong)
    assert any(problem.endswith(("@ $." + name, "@ $.other")) for problem in caught.value.problems)
    assert all(torch.equal(before[key], tensor) for key, tensor in adapter.named().items())


def test_loading_copies() -> None:
    """Loaded tensors are copied, half precision included."""
    source, target = stir(adapters.create(tiny(), SPEC)), adapters.create(tiny(), SPEC)
    target.load({name: tensor.detach().half() for name, tensor in source.named().items()})
    for name, tensor in target.named().items():
        assert torch.equal(tensor, source.named()[name].half().float())


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"target_modules": ("q_proj", "nonesuch")}, "target_modules"),
        ({"target_modules": ()}, "target_modules"),
        ({"target_modules": ("proj",)}, "target_modules"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(settings: dict[str, object], field: str) -> None:
    """The error names the field; a target that matches nothing lists the layers there are."""
    with pytest.raises(InvalidRequestError) as caught:
        adapters.create(tiny(), attrs.evolve(SPEC, **settings))
    assert caught.value.field == field


def test_an_adapter_says_what_it_is() -> None:
    """The repr of an adapter names rank and size."""
    assert repr(adapters.create(tiny(), SPEC)) == "<Adapter rank 4 on 28 layers, 45056 values>"
