"""Keys and values of what was read before, for prompts that begin with the same tokens.

Nothing is shared between adapters or between cache keys, and what belongs to an adapter goes with it, so a stale or
foreign prefix cannot be found. What is kept longest unused goes first when the budget is spent.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from tg_tinker.engine.lora.adapters import FrozenAdapter

__all__ = ["PrefixCache"]

_BLOCK = 16  # tokens: prefixes are found by whole blocks, then matched to the token


@attrs.define(eq=False)
class _Entry:
    tokens: tuple[int, ...]
    state: Tensor  # (layers, 2, key heads, tokens, head size)
    size: int  # bytes
    used: int = 0  # when it was used last


class _Shelf:
    """The entries of one adapter and one cache key."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple[int, ...], _Entry] = OrderedDict()
        self._by_block: dict[int, _Entry] = {}

    def put(self, entry: _Entry) -> None:
        self.entries[entry.tokens] = entry
        for key in _block_keys(entry.tokens):
            self._by_block[key] = entry

    def drop(self, entry: _Entry) -> None:
        del self.entries[entry.tokens]
        for key in _block_keys(entry.tokens):
            if self._by_block.get(key) is entry:
                del self._by_block[key]

    def longest(self, tokens: tuple[int, ...]) -> tuple[_Entry, int] | None:
        """Find an entry that begins as ``tokens`` do, and for how many tokens."""
        found: _Entry | None = None
        for key in _block_keys(tokens):
            if (entry := self._by_block.get(key)) is None:
                break
            found = entry
        if found is None:
            return None
        pairs = zip(found.tokens, tokens, strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(found.tokens), len(tokens)))
        return (found, same) if same else None


class _BaseAlone:
    """Stands for the absent adapter."""


class PrefixCache:
    """A bounded memory of prefixes; used by one thread, except that adapters may be collected on any."""

    def __init__(self, budget: int) -> None:
        """Take the budget in bytes; 0 keeps nothing."""
        self._budget = budget
        self._clock = 0
        self._at_most = 0  # bytes: adapters that were collected may have taken some of them along
        self._base_alone = _BaseAlone()
        self._shelves: WeakKeyDictionary[FrozenAdapter | _BaseAlone, dict[str | None, _Shelf]] = WeakKeyDictionary()

    @property
    def enabled(self) -> bool:
        """Whether anything is ever kept."""
        return self._budget > 0

    @property
    def size(self) -> int:
        """Bytes in use."""
        return sum(entry.size for _, entry in self._entries())

    def find(self, tokens: tuple[int, ...], adapter: FrozenAdapter | None, cache_key: str | None) -> Tensor | None:
        """Give the state (layers, 2, key heads, n, head size) of the longest known prefix, or None.

        At least the last token is always left to be read: its logits are what a prompt is read for.
        """
        shelf = self._shelves.get(adapter or self._base_alone, {}).get(cache_key)
        found = shelf.longest(tokens) if shelf else None
        if found is None:
            return None
        entry, same = found
        length = min(same, len(tokens) - 1)
        self._touch(entry)
        return entry.state[:, :, :, :length] if length else None

    def put(self, tokens: tuple[int, ...], state: Tensor, adapter: FrozenAdapter | None, cache_key: str | None) -> None:
        """Keep the state after ``tokens``; the tensor must not change afterwards."""
        entry = _Entry(tokens, state, state.untyped_storage().nbytes())
        if len(tokens) < _BLOCK or entry.size > self._budget:
            return
        shelf = self._shelves.setdefault(adapter or self._base_alone, {}).setdefault(cache_key, _Shelf())
        if tokens not in shelf.entries:
            self._make_room(entry.size)
            shelf.put(entry)
            self._touch(entry)

    def clear(self) -> None:
        """Forget everything."""
        self._shelves.clear()

    def _touch(self, entry: _Entry) -> None:
        self._clock += 1
        entry.used = self._clock

    def _make_room(self, size: int) -> None:
        self._at_most += size
        if self._at_most <= self._budget:
            return
        kept = self.size + size
        for shelf, entry in sorted(self._entries(), key=lambda pair: pair[1].used) if kept > self._budget else ():
            if kept <= self._budget - self._budget // 8:  # more than needed, so that this does not happen at every put
                break
            shelf.drop(entry)
            kept -= entry.size
        self._at_most = kept

    def _entries(self) -> Iterator[tuple[_Shelf, _Entry]]:
        for shelves in list(self._shelves.values()):
            for shelf in shelves.values():
                for entry in shelf.entries.values():
                    yield shelf, entry


def _block_keys(tokens: tuple[int, ...]) -> Iterator[int]:
    """Give a hash of the first block, of the first two, and so on; what it finds is compared token by token."""
    key = 0
    for end in range(_BLOCK, len(tokens) + 1, _BLOCK):
        key = hash((key, tokens[end - _BLOCK : end]))
        yield key
