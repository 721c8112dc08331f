from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from tg_tinker.errors import InvalidRequestError
from tg_tinker.store.peft_export import export_peft

# peft asks a model for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def make_model(*, tied: bool = False) -> LlamaForCausalLM:
    """Make a small seeded Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("targets", "saved"),
    [
        (None, None),
        (("q_proj", "down_proj"), None),
        (("q_proj",), ["lm_head", "model.norm", "layers.1.input_layernorm"]),
        (("q_proj",), ["embed_tokens"]),
    ],
)
def test_peft_loads_the_exported_folder(
    tmp_path: Path, targets: tuple[str, ...] | None, saved: list[str] | None, tied: bool
) -> None:
    """``PeftModel.from_pretrained`` gives the logits of the model that the tensors were trained in."""
    wanted = "all-linear" if targets is None else list(targets)
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=wanted, modules_to_save=saved)
    trained = get_peft_model(make_model(tied=tied), settings).eval()
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    tensors = dict(get_peft_model_state_dict(trained))
    ids = torch.arange(10).reshape(2, 5)
    expected = trained(ids).logits
    extra = {**tensors, "exp_avg.something": torch.zeros(2)}
    export_peft(tmp_path / "adapter", extra, base_model="base", rank=4, alpha=12.0, target_modules=targets)
    loaded = PeftModel.from_pretrained(make_model(tied=tied), str(tmp_path / "adapter"))
    assert torch.equal(loaded(ids).logits, expected)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_arrays_are_exported_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened offline becomes the same folder where torch is not installed."""
    name = "base_model.model.layer.lora_"
    tensors = {f"{name}A.weight": torch.rand(2, 3), f"{name}B.weight": torch.rand(4, 2)}
    settings = {"base_model": "b", "rank": 2, "alpha": 4.0}
    export_peft(tmp_path / "with", tensors, **settings)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    for module in ("torch", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    export_peft(tmp_path / "without", arrays, **settings)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "without" / file).read_bytes() == (tmp_path / "with" / file).read_bytes()


def test_nothing_to_export_is_refused(tmp_path: Path) -> None:
    """Without LoRA weights there is no folder."""
    with pytest.raises(InvalidRequestError) as caught:
        export_peft(tmp_path / "adapter", {"x": torch.zeros(1)}, base_model="b", rank=1, alpha=1.0)
    assert caught.value.field == "tensors"
    assert not (tmp_path / "adapter").exists()
