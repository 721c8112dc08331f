"""The little that the input types ask of a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from tg_tinker.types import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, field: str, text: object, *, special: bool = True) -> list[int]:
    """The token ids of a text. Raises ``InvalidRequestError`` naming ``field`` for what is no text."""
    if not isinstance(text, str):
        raise checks.refuse(field, "a string", text)
    options: dict[str, Any] = {} if special else {"add_special_tokens": False}
    try:
        return list(tokenizer.encode(text, **options))
    except TypeError as error:  # half a surrogate pair
        raise checks.refuse(field, "text that UTF-8 can write", text) from error


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends a text, as a list of one, or of none where the tokenizer has no such token."""
    if not hasattr(tokenizer, "eos_token_id"):
        raise checks.refuse("tokenizer", "a tokenizer, as get_tokenizer() gives one", tokenizer)
    token = cast("Any", tokenizer.eos_token_id)
    return [] if token is None else [int(token)]


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; the mask hides it, so any will do."""
    token = cast("Any", tokenizer.pad_token_id)
    return 0 if token is None else int(token)
