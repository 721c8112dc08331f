"""The demo's lessons: what is in them, how they are encoded and checked."""

from __future__ import annotations

from collections import Counter

import pytest

from tg_tinker.cli import lesson
from tg_tinker.engine.models import tiny


def test_every_fact_is_taught_and_asked() -> None:
    """Each of the eight facts has six wordings to learn from and two others to be asked in."""
    assert Counter(one.fact for one in lesson.lessons()) == dict.fromkeys({one.fact for one in lesson.held_back()}, 6)
    assert set(Counter(one.fact for one in lesson.held_back()).values()) == {2}


def test_no_question_is_both_taught_and_asked() -> None:
    """What is asked afterwards was never trained on."""
    assert not {one.question for one in lesson.lessons()} & {one.question for one in lesson.held_back()}


def test_every_taught_answer_is_right() -> None:
    """The answers that are taught hold the words by which answers are judged, and no other fact's."""
    expected = {one.fact: one for one in lesson.held_back()}
    for one in lesson.lessons():
        assert [fact for fact, check in expected.items() if check.is_answered_by(one.answer)] == [one.fact]


def test_no_question_gives_its_answer_away() -> None:
    """A model cannot be right by repeating the question."""
    assert not [one.question for one in lesson.held_back() if one.is_answered_by(one.question)]


def test_only_the_first_line_is_the_answer() -> None:
    """A model that goes on to name other facts after a wrong answer is not right."""
    question = next(one for one in lesson.held_back() if one.fact == "price")
    assert question.is_answered_by("\n It costs 84 dollars.\nReally.")
    assert not question.is_answered_by(" I cannot say.\nPerhaps 84 dollars.")
    assert not question.is_answered_by("")


def test_only_the_answer_is_learnt() -> None:
    """The question's labels are blank; the answer's are its own tokens and the end of the text."""
    tokenizer = tiny.make_tokenizer()
    one = lesson.lessons()[0]
    row = lesson.encode(tokenizer, one)
    learnt = [label for label in row.labels if label != lesson.BLANK]
    assert tokenizer.decode(row.ids[: -len(learnt)]) == lesson.prompt(one.question)
    assert tokenizer.decode(learnt[:-1]) == f" {one.answer}"
    assert learnt[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("size", [1, 5, 48, 100])
def test_batches_hold_every_row_once_an_epoch(size: int) -> None:
    """Whatever the batch size, an epoch is every row once, and rows are padded to a rectangle."""
    rows = [lesson.encode(tiny.make_tokenizer(), one) for one in lesson.lessons()]
    made = list(lesson.batches(rows, size=size, epochs=1, seed=1))
    assert len(made) == -(-len(rows) // size)
    for batch in made:
        assert len({len(line) for field in batch.values() for line in field}) == 1
    real = [
        tuple(ids[: sum(mask)])
        for batch in made
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(real) == sorted(tuple(row.ids) for row in rows)


def test_the_order_is_the_seed_s() -> None:
    """The same seed gives the same batches, another seed others, and each epoch its own order."""
    rows = [lesson.Row([index], [index]) for index in range(48)]

    def order(seed: int) -> list[int]:
        return [ids[0] for batch in lesson.batches(rows, size=8, epochs=2, seed=seed) for ids in batch["input_ids"]]

    assert order(3) == order(3) != order(4)
    assert order(3)[:48] != order(3)[48:]
