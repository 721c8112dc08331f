from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tg_tinker.engine.models import tiny
from tg_tinker.engine.sampling.detokenize import StopTexts, TextStream, TokenReader, decoder_of

SPECIAL = "<\ufffd"  # begins a special token; stands for what is no text
LINES = ["the quick brown fox", "größer als 😀 und 漢字かな", "naïve café — “quotes”", "a\n\nb\tc  d", "😀😀👩‍👩‍👧"]


def byte_pairs():
    """A byte-level BPE tokenizer with merges that cross characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_pieces():
    """A tokenizer as Llama 2 has it: spaces as a mark, unknown bytes as tokens of their own."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "qu", "ick", "▁fox", "e", "r", "ö", "s"]
    tokenizer = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {"tiny": tiny.make_tokenizer(), "byte pairs": byte_pairs(), "sentence pieces": sentence_pieces()}


def in_bytes(character):
    """The byte tokens of one character."""
    return [byte + 1 for byte in character.encode()]


def read(tokenizer, ids):
    """Every piece, the rest last."""
    reader = TokenReader(decoder_of(tokenizer))
    return [*(reader.push(token) for token in ids), reader.rest()]


@pytest.mark.parametrize("name", ["tiny", "byte pairs"])
@settings(max_examples=200)
@given(data=st.data())
def test_pieces_are_the_text(name, data):
    """Any tokens, valid text or not: the pieces joined are the text of all of them."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(read(tokenizer, ids)) == whole


@settings(max_examples=200)
@given(
    st.lists(
        st.one_of(st.integers(257, 265).map(lambda n: [n]), st.characters(exclude_categories=["Cs"]).map(in_bytes))
    )
)
def test_pieces_are_the_text_of_sentence_pieces(parts):
    """Words and the bytes of whole characters: the pieces joined are the text of all of them.

    (Bytes that are no text make such a decoder take back what it had read before, so nothing is promised for those.)
    """
    tokenizer = TOKENIZERS["sentence pieces"]
    ids = [token for part in parts for token in part]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(read(tokenizer, ids)) == whole


@pytest.mark.parametrize("name", ["tiny", "byte pairs"])
@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPECIAL), max_size=30))
def test_no_piece_ends_inside_a_character(name, text):
    """Valid text never shows a replacement character, however its bytes fall into tokens."""
    tokenizer = TOKENIZERS[name]
    pieces = read(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_four_bytes_comes_at_once():
    """Nothing is given out until the last byte of a character is there."""
    assert read(TOKENIZERS["tiny"], list("a😀b".encode())) == ["a", "", "", "", "😀", "b", ""]


def test_what_never_becomes_a_character_comes_at_the_end():
    """A completion cut inside a character ends with its replacement, as decoding all tokens does."""
    assert read(TOKENIZERS["tiny"], [97, 0xF0, 0x9F]) == ["a", "", "", "\ufffd"]


def test_special_tokens_have_no_text():
    """End and padding tokens add nothing."""
    assert "".join(read(TOKENIZERS["tiny"], [104, 257, 105, 258])) == "hi"


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_text_is_cut_at_the_first_stop(pieces, stops):
    """However the text is cut into pieces, what comes out is the text before the first stop text."""
    whole = "".join(pieces)
    starts = [whole.find(stop) for stop in stops if stop in whole]
    cut = StopTexts(stops)
    out = []
    for piece in pieces:
        out.append(cut.push(piece))
        if cut.found:
            break
        shown = "".join(out)
        assert not any(stop in shown for stop in stops)
    out.append(cut.rest())
    assert cut.found == bool(starts)
    if not starts:
        assert "".join(out) == whole
    else:
        # The stop that is complete first may begin after another one that is complete later: the earliest seen counts.
        shown = "".join(out)
        assert whole.startswith(shown)
        assert any(whole.startswith(stop, len(shown)) for stop in stops)
        assert not any(stop in shown for stop in stops)


@settings(max_examples=200)
@given(pieces=st.lists(st.text("ab", max_size=3), max_size=10), stop=st.text("ab", min_size=1, max_size=5))
def test_only_a_possible_stop_is_held_back(pieces, stop):
    """What is held back is exactly the longest end of the text that begins the stop text."""
    cut = StopTexts([stop])
    fed = out = ""
    for piece in pieces:
        fed += piece
        out += cut.push(piece)
        if cut.found:
            assert out == fed[: fed.index(stop)]
            return
        held = max(size for size in range(len(stop)) if fed.endswith(stop[:size]))
        assert out == fed[: len(fed) - held]


def test_a_stop_text_across_tokens_and_characters():
    """A stop text is found across tokens, multi-byte characters included, and what follows is not read."""
    stream = TextStream(decoder_of(TOKENIZERS["tiny"]), ["é!"])
    shown = "".join(stream.push(byte) for byte in "caf\u00e9 é!".encode())
    assert (shown + stream.rest(), stream.stopped) == ("café ", True)
    assert stream.push(65) == ""


def test_a_stop_text_that_only_the_end_decides():
    """A replacement character that comes with the end can complete a stop text."""
    stream = TextStream(decoder_of(TOKENIZERS["tiny"]), ["\ufffd"])
    assert [stream.push(97), stream.push(0xF0)] == ["a", ""]
    assert (stream.rest(), stream.stopped) == ("", True)
