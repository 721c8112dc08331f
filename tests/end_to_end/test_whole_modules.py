"""Modules trained whole beside an adapter, from the config to a peft folder, on a real embedded server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fixtures.programs import BATCH, tg_config
from peft import PeftModel

from tg_tinker import InvalidRequestError, LoRAConfig, ServiceClient, TrainingClient
from tg_tinker.cli import main
from tg_tinker.engine.models import tiny

pytestmark = pytest.mark.timeout(240)

WHOLE = LoRAConfig(rank=4, dropout=0.0, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "model.norm"])


def learn(tc: TrainingClient, steps: int) -> list[float]:
    """Train on the batch; the losses before each step."""
    pairs = [(tc.forward_backward(BATCH), tc.optim_step()) for _ in range(steps)]
    return [loss.result(timeout=60).loss for loss, _ in pairs]


def greedy(tc: TrainingClient) -> list[int]:
    """What the run says to a prompt when it says the likeliest."""
    (sample,) = tc.sample("Hello", max_tokens=24, temperature=0.0).samples
    return sample.token_ids


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_is_trained_whole_is_sampled_saved_and_exported(
    service: ServiceClient, home: Path, tmp_path: Path
) -> None:
    """The head learns, samples come from it, a state brings it back, and peft generates the same from the export."""
    tc = service.create_training_client(tg_config(lora_config=WHOLE))
    before = greedy(tc)
    losses = learn(tc, 6)
    after = greedy(tc)
    assert losses[-1] < losses[0] - 0.5
    assert after != before

    saved = tc.save_state()
    learn(tc, 1)
    assert tc.load_state(saved.artifact_id).exact
    assert greedy(tc) == after
    other = service.create_training_client(tg_config(lora_config=WHOLE), checkpoint_id=saved.artifact_id)
    assert greedy(other) == after
    assert learn(other, 2) == learn(tc, 2)

    folder = tmp_path / "adapter"
    command = ["artifacts", "export-peft", saved.artifact_id, str(folder), "--home", str(home)]
    assert CliRunner().invoke(main, command).exit_code == 0
    model = PeftModel.from_pretrained(tiny.make_model(), str(folder)).eval()
    prompt = torch.tensor([tiny.make_tokenizer().encode("Hello")])
    made = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=len(after)
    )
    assert made[0, prompt.shape[1] :].tolist() == list(after)


def test_runs_with_and_without_whole_modules_share_a_server(service: ServiceClient) -> None:
    """Neither changes what the other computes, whatever order their operations come in."""
    plain, whole = (
        service.create_training_client(tg_config(lora_config=config))
        for config in (LoRAConfig(rank=4, dropout=0.0), WHOLE)
    )
    alone = service.create_training_client(tg_config(lora_config=LoRAConfig(rank=4, dropout=0.0)))
    expected = learn(alone, 3)
    mixed = []
    for _ in range(3):
        mixed += learn(plain, 1)
        learn(whole, 1)
    assert mixed == expected
    assert greedy(plain) == greedy(alone)


@pytest.mark.parametrize(
    ("saved", "said"),
    [(["head"], "match no module with weights; there are: "), (["q_proj"], "target_modules adapts it")],
)
def test_a_module_that_cannot_be_trained_whole_is_refused(service: ServiceClient, saved: list[str], said: str) -> None:
    """An unknown module, and one that the adapter covers, are refused when the run is made, by field."""
    config = tg_config(lora_config=LoRAConfig(rank=4, modules_to_save=saved))
    with pytest.raises(InvalidRequestError, match=said) as caught:
        service.create_training_client(config)
    assert caught.value.field == "lora_config.modules_to_save"


def test_privacy_and_whole_modules_exclude_each_other() -> None:
    """Nothing would clip the gradients of whole modules, so a private config with them cannot be made."""
    with pytest.raises(InvalidRequestError) as caught:
        tg_config(lora_config=WHOLE, dp_config={})
    assert caught.value.field == "lora_config.modules_to_save"
    assert tg_config(lora_config=WHOLE, dp_config={"enabled": False}).lora_config == WHOLE
