"""Small random models, adapters that change what they say, and listeners that remember what they heard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tg_tinker.engine.lora import adapters, lora_linear
from tg_tinker.engine.models import base_model, tiny
from tg_tinker.engine.models.base_model import BaseModel
from tg_tinker.engine.sampling.sampler import Generation, GenerationRequest, Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.errors import TGTinkerError

SHAPE = {
    "vocab_size": 262,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SCALED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-scaled": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": SCALED, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt-neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"num_key_value_heads": None}),
}


class Recorder:
    """A listener that keeps everything."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.pieces: list[str] = []
        self.generation: Generation | None = None
        self.error: TGTinkerError | None = None

    @property
    def ended(self) -> bool:
        return self.generation is not None or self.error is not None

    @property
    def result(self) -> Generation:
        assert self.generation is not None, self.error
        return self.generation

    def on_token(self, token_id: int, logprob: float, text: str) -> None:
        assert not self.ended
        self.tokens.append(token_id)
        self.logprobs.append(logprob)
        self.pieces.append(text)

    def on_done(self, generation: Generation) -> None:
        assert not self.ended
        self.generation = generation

    def on_error(self, error: TGTinkerError) -> None:
        assert not self.ended
        self.error = error


class Kit:
    """What the tests of sampling are made with."""

    Recorder = Recorder

    def base(self, family: str, *, eos: frozenset[int] = frozenset(), seed: int = 0, **overrides: Any) -> BaseModel:
        """A random model of the family, its weights large enough that logits differ clearly."""
        config_class, model_class, own = FAMILIES[family]
        config = config_class(**{**SHAPE, **own, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config)
            for name, parameter in model.named_parameters():
                torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
                if "norm" in name and name.endswith("weight"):
                    parameter.data += 1.0
        return self.wrap(model, eos=eos)

    def wrap(self, model: Any, *, eos: frozenset[int] = frozenset()) -> BaseModel:
        """What ``base_model.load`` would make of the model."""
        model.requires_grad_(False).eval()
        model.generation_config.eos_token_id = None
        lora_linear.install(model)
        return BaseModel(
            name="random",
            model=model,
            tokenizer=tiny.make_tokenizer(),
            device=torch.device("cpu"),
            dtype=model.dtype,
            vocab_size=model.config.vocab_size,
            max_length=model.config.max_position_embeddings,
            eos_token_ids=eos,
            digest="sha256:0",
        )

    def tiny(self) -> BaseModel:
        """The built-in model."""
        return base_model.load(tiny.NAME, home=Path("unused"), device="cpu")

    def adapter(
        self,
        base: BaseModel,
        seed: int = 1,
        *,
        rank: int = 4,
        targets: tuple[str, ...] | None = None,
        saved: tuple[str, ...] = (),
    ) -> FrozenAdapter:
        """An adapter that changes the model's mind: B is not zero, and modules trained whole are not the base's."""
        spec = adapters.AdapterSpec(rank, alpha=2.0 * rank, target_modules=targets, seed=seed, modules_to_save=saved)
        adapter = adapters.create(base, spec)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapter.parameter_dict().items():
                if "lora_A" not in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return adapter.snapshot()

    def prompt(self, length: int, seed: int = 0) -> tuple[int, ...]:
        """Random bytes."""
        generator = torch.Generator().manual_seed(1000 * length + seed)
        return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())

    def request(self, prompt: Sequence[int], **settings: Any) -> GenerationRequest:
        """A request with defaults that end soon."""
        return GenerationRequest(prompt=tuple(prompt), **{"max_tokens": 12, "seed": 7, **settings})

    def submit(self, sampler: Sampler, *requests: GenerationRequest) -> list[Recorder]:
        """Hand in requests, each with a recorder."""
        recorders = [Recorder() for _ in requests]
        for request, recorder in zip(requests, recorders, strict=True):
            sampler.submit(request, recorder)
        return recorders

    def run(self, sampler: Sampler, *requests: GenerationRequest) -> list[Generation]:
        """Hand in requests together and work until all are done."""
        recorders = self.submit(sampler, *requests)
        self.drain(sampler)
        return [recorder.result for recorder in recorders]

    def drain(self, sampler: Sampler, ticks: int = 3000) -> None:
        """Work until nothing is left to do."""
        for _ in range(ticks):
            if not sampler.busy:
                return
            sampler.step()
        raise AssertionError(f"still busy after {ticks} ticks")

    @torch.no_grad()
    def logits(self, base: BaseModel, adapter: FrozenAdapter | None, tokens: Sequence[int]) -> torch.Tensor:
        """The oracle: the model's own forward pass, without a cache (T, V)."""
        with adapters.active(base, adapter):
            return base.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def greedy(
        self, base: BaseModel, adapter: FrozenAdapter | None, prompt: Sequence[int], count: int
    ) -> tuple[list[int], int]:
        """The naive loop: its tokens, and how many of them come before the first that rounding could change."""
        tokens, clear = list(prompt), count
        for step in range(count):
            best = self.logits(base, adapter, tokens)[-1].topk(2)
            if float(best.values[0] - best.values[1]) < 1e-3:
                clear = min(clear, step)
            tokens.append(int(best.indices[0]))
        return tokens[len(prompt) :], clear


@pytest.fixture(scope="session")
def kit() -> Kit:
    """Models, adapters, requests and listeners."""
    return Kit()


@pytest.fixture(scope="session")
def tiny_base(kit: Kit) -> BaseModel:
    """The built-in tiny model."""
    return kit.tiny()
