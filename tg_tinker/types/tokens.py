"""The little that the input types ask of a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends a text, as a list of one, or of none where the tokenizer has no such token."""
    token = cast("Any", tokenizer.eos_token_id)
    return [] if token is None else [int(token)]


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; the mask hides it, so any will do."""
    token = cast("Any", tokenizer.pad_token_id)
    return 0 if token is None else int(token)
