"""The built-in ``tg-tinker/tiny``: a seeded random Llama of about a million parameters and a byte-level tokenizer.

It needs no file and no network and is the same, bit for bit, in every process. It knows nothing: it is for tests and
for trying a training loop, not for text.
"""

from __future__ import annotations

import math

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["EOS", "NAME", "make_model", "make_tokenizer"]

NAME = "tg-tinker/tiny"
SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|sep|>")
BOS, EOS, PAD = 256, 257, 258
END = 262
MAX_LENGTH = 2048

_SEED = 20260819
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Build the model on the CPU, from its seed alone; the global random state is left as it was."""
    config = LlamaConfig(
        vocab_size=256 + len(SPECIALS),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=[EOS, END],
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    _initialize(model)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay fp32, as transformers keeps them
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def _initialize(model: LlamaForCausalLM) -> None:
    """Draw each weight at a scale that keeps activations near one and logits far from uniform."""
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.fill_(1.0)  # norms
            continue
        std = 1.0 if "embed_tokens" in name else 1.0 / math.sqrt(parameter.shape[1])
        nn.init.normal_(parameter, std=2.0 * std if "lm_head" in name else std, generator=generator)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: id ``b`` is byte ``b``, the special tokens follow; nothing is added to a text."""
    vocabulary = {character: byte for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIALS[0],
        eos_token=SPECIALS[1],
        pad_token=SPECIALS[2],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> dict[int, str]:
    """Map each byte to the printable character that stands for it in byte-level BPE (Radford et al., 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
