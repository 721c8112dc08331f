"""Text from tokens as they come: no delta ends inside a character, none holds a part of a stop text.

Which token ends a completion is the sampler's affair; here is only what can be read so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

__all__ = ["StopTexts", "TextStream", "TokenReader", "decoder_of"]

_UNDECIDED = "\N{REPLACEMENT CHARACTER}"


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Give the function that turns ids into text, special tokens left out and spaces as they are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return lambda ids: str(backend.decode(ids, skip_special_tokens=True))


class TokenReader:
    """Turns tokens into text piece by piece: the pieces and the rest together are the text of all tokens at once.

    A decoder may look at neighbours (bytes of one character, the space before a word), so each piece is what a short
    window of tokens gains by its newest ones, and is given out only when it does not end in an undecided character.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # the tokens of the last piece, then those that are not read yet
        self._read = 0  # how many of the window are the last piece
        self._known = ""  # their text

    def push(self, token: int) -> str:
        """Take one token and give the text that became certain."""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) <= len(self._known) or text.endswith(_UNDECIDED):
            return ""
        return self._advance(text)

    def rest(self) -> str:
        """Give what is left when no token will follow, incomplete characters included."""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        piece = text[len(self._known) :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._known = self._decode(self._window)
        return piece


class StopTexts:
    """Cuts a text at the first stop text, and holds back an end that could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take more text and give what is certainly before any stop text."""
        if not self._stops or self.found:
            return "" if self.found else text
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        certain = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """Give what was held back when no text will follow."""
        text, self._held = self._held, ""
        return text


class TextStream:
    """The text of one completion while its tokens come in."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._reader = TokenReader(decode)
        self._stops = StopTexts(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop text was reached."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Take one token and give the text that became certain."""
        text = self._reader.push(token)
        return self._stops.push(text) if text else ""

    def rest(self) -> str:
        """Give the last text, when no token will follow; it may still reach a stop text."""
        text = self._stops.push(self._reader.rest())
        return text + self._stops.rest()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
