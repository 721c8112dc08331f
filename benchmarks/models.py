"""The models that are measured: a random one of Qwen3's shape, made here, and the one that ``models fetch`` brings.

The random models have 4096 tokens: the small one 6 layers, hidden size 256, 6.82 million parameters; another a GPT's
proportions in Llama's shape, 8 layers, hidden size 320, 11.6 million parameters; the last is a GPT-NeoX, for which the
engine has no forward pass of its own: 4 layers, hidden size 256, 5.26 million parameters.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from string import ascii_letters, digits
from typing import TYPE_CHECKING

from benchmarks.measure import NotHereError
from tg_tinker.home import folder as home_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMOLLM2 = "tg-tinker/smollm2-135m"
VOCABULARY = 4096
RANK = 8
_SPECIALS = ("<|bos|>", "<|eos|>")
_SEED = 6_820_000


def make_small(folder: Path) -> Path:
    """Write the random model and its tokenizer as a local folder; the same bits every time."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    torch.manual_seed(_SEED)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def make_gpt(folder: Path) -> Path:
    """Write the larger random model and the same tokenizer; the same bits every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=912,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    torch.manual_seed(_SEED)
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def make_neox(folder: Path) -> Path:
    """Write the random GPT-NeoX and the same tokenizer; the same bits every time."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    torch.manual_seed(_SEED)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, two special tokens, and pairs of letters and digits up to the size of the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    singles = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(one, two) for one, two in product(ascii_letters + digits, repeat=2)]
    pairs = pairs[: VOCABULARY - len(singles) - len(_SPECIALS)]
    tokens = [*singles, *_SPECIALS, *(one + two for one, two in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_SPECIALS[0], eos_token=_SPECIALS[1])


def smollm2_folder() -> Path:
    """Where the fetched model lies. Raises ``NotHereError`` when nobody fetched it."""
    folder = home_folder() / "models" / "smollm2-135m"
    if not (folder / "config.json").is_file():
        raise NotHereError("SmolLM2-135M is not here; fetch it with: tg-tinker models fetch smollm2-135m")
    return folder
