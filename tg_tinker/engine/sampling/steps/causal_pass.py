"""One forward pass of transformers' model: rows of tokens in, logits and the cache out.

What is in a cache, and which tokens go together, is the callers' affair.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from tg_tinker.engine.lora import adapters
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter
    from tg_tinker.engine.models.base_model import BaseModel

__all__ = ["CausalPass"]

_OLD_NAME = "past_key_values"  # of the cache, before transformers 5.24


class CausalPass:
    """The model of ``base``, to be called."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._chooses = "logits_to_keep" in inspect.signature(base.model.forward).parameters
        self._cache = "cache" if "cache" in inspect.signature(type(base.model).forward).parameters else _OLD_NAME

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        adapter: FrozenAdapter | None,
        cache: Any,
        *,
        columns: Sequence[int] | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """Read ``rows`` (B, T) of tokens that follow what ``cache`` holds, None for nothing.

        Gives logits (B, columns or T, vocabulary) and the cache; ``more`` goes to the model as it is.

        Raises:
            InvalidRequestError: when the model made no cache.

        """
        ids = torch.tensor(rows, device=self._base.device)
        wanted = None if columns is None else torch.tensor(columns, device=self._base.device)
        keep: dict[str, Any] = {} if wanted is None or not self._chooses else {"logits_to_keep": wanted}
        with adapters.active(self._base, adapter):
            output = self._base.model(input_ids=ids, use_cache=True, **{self._cache: cache}, **keep, **(more or {}))
        cache = getattr(output, self._cache, None)
        if cache is None:
            message = f"{self._base.name} keeps no key/value cache, so it cannot be sampled from token by token"
            raise InvalidRequestError(message, field="base_model", constraint="a model with a key/value cache")
        return output.logits if wanted is None or keep else output.logits[:, wanted], cache
