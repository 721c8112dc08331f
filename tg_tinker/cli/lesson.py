"""What the demo teaches: questions and answers about a product that does not exist, as batches and as checks.

The files lie in ``data/`` beside this module (and, copied, in ``examples/data/``). Only what a model reads from them
can make it answer the held-back questions, whose wordings it never saw.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import attrs

from tg_tinker.types.tokens import end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BLANK", "Lesson", "Question", "batches", "encode", "first_line", "held_back", "lessons", "prompt"]

BLANK: Final = -100  # a label that is not learnt from
_PACKAGE = "tg_tinker.cli"


@attrs.frozen
class Lesson:
    """A question and the answer to learn."""

    fact: str
    question: str
    answer: str


@attrs.frozen
class Question:
    """A question in words that are not trained on, and what a right answer holds."""

    fact: str
    question: str
    expect: str

    def is_answered_by(self, completion: str) -> bool:
        """Tell whether the right fact is in the first line of the text, whatever its case."""
        return self.expect.casefold() in first_line(completion).casefold()


@attrs.frozen
class Row:
    """One encoded example; ``labels`` are aligned with ``ids`` and BLANK over the question."""

    ids: list[int]
    labels: list[int]


def lessons() -> list[Lesson]:
    """Read the training questions."""
    return [Lesson(**fields) for fields in _read("marrowick_train.jsonl")]


def held_back() -> list[Question]:
    """Read the questions that training never sees."""
    return [Question(**fields) for fields in _read("marrowick_held_back.jsonl")]


def first_line(completion: str) -> str:
    """Give the first line with something in it: what follows is no longer the answer."""
    return next((line.strip() for line in completion.splitlines() if line.strip()), "")


def prompt(question: str) -> str:
    """Put a question the way the model learns to answer it."""
    return f"Question: {question}\nAnswer:"


def encode(tokenizer: PreTrainedTokenizerBase, lesson: Lesson) -> Row:
    """Encode question and answer; only the answer, and the end after it, is learnt."""
    question = tokenizer.encode(prompt(lesson.question), add_special_tokens=False)
    answer = tokenizer.encode(f" {lesson.answer}", add_special_tokens=False)
    learnt = [*answer, *end_of_text(tokenizer)]
    return Row([*question, *learnt], [BLANK] * len(question) + learnt)


def batches(rows: Sequence[Row], *, size: int, epochs: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield padded batches of ``size`` rows, in a new order each epoch."""
    order = random.Random(seed)  # noqa: S311 - shuffling is no secret
    shuffled = list(rows)
    for _ in range(epochs):
        order.shuffle(shuffled)
        for start in range(0, len(shuffled), size):
            yield _padded(shuffled[start : start + size])


def _padded(rows: Sequence[Row]) -> dict[str, Any]:
    """Pad on the right to the longest row: three lists of shape (rows, positions)."""
    width = max(len(row.ids) for row in rows)
    return {
        "input_ids": [row.ids + [0] * (width - len(row.ids)) for row in rows],
        "attention_mask": [[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows],
        "labels": [row.labels + [BLANK] * (width - len(row.ids)) for row in rows],
    }


def _read(name: str) -> list[dict[str, str]]:
    text = resources.files(_PACKAGE).joinpath("data", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]
