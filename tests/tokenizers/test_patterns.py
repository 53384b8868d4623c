"""Splitting: against tiktoken's own patterns in the `regex` package, and the C core against Python."""

import random

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.tokenizers import core
from quire.tokenizers.patterns import PATTERNS, character_classes, splitter

quick = settings(max_examples=100, deadline=None)
compiled = pytest.mark.skipif(core.fast is None, reason="the C core is not compiled")


@pytest.fixture(scope="module")
def agreeing() -> set[str]:
    """The characters that `regex`, with its own Unicode, puts into the class that our tables say."""
    classes = character_classes()
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    theirs = {}
    for number, pattern in ((1, r"\p{L}+"), (2, r"\p{N}+"), (3, r"\s+")):
        theirs |= {character: number for run in regex.findall(pattern, text) for character in run}
    agreed = {character for character in text if theirs.get(character, 0) == classes[ord(character)]}
    assert len(agreed) > 1_000_000
    return agreed


def check(text: str, name: str, oracle: regex.Pattern, agreeing: set[str]) -> None:
    text = "".join(character for character in text if character in agreeing)
    assert splitter(name).findall(text) == oracle.findall(text)


@pytest.mark.parametrize("name", ["gpt2", "cl100k"])
def test_the_pieces_are_those_of_tiktokens_pattern(name, patterns, agreeing, texts):
    oracle = regex.compile(patterns[name])
    for text in texts(1500, seed=1):
        check(text, name, oracle, agreeing)

    @quick
    @given(st.text(max_size=40))
    def on_any(text):
        check(text, name, oracle, agreeing)

    @quick
    @given(st.text(st.sampled_from(" \n\r\tab1'sStTlLvVrReE.\u017f森\u0301"), max_size=12))
    def on_few_characters(text):
        check(text, name, oracle, agreeing)

    on_any()
    on_few_characters()


def test_cl100k_of_hugging_face_differs_only_in_white_space_at_the_end(texts):
    for text in texts(1500, seed=2):
        visible = text + "x"
        assert splitter("cl100k-hf").findall(visible) == splitter("cl100k").findall(visible)


@pytest.mark.parametrize("name", PATTERNS)
@quick
@given(st.text(max_size=40))
def test_pieces_join_to_the_text(name, text):
    pieces = splitter(name).findall(text)
    assert "".join(pieces) == text and all(pieces)


@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_of_hard_texts_join_to_the_text(name, texts):
    for text in texts(600, seed=3, length=30):
        assert "".join(splitter(name).findall(text)) == text


# ---- words and white space ----


def test_words_punctuation_and_white_space():
    assert splitter("word").findall("Don't  stop: 3rd 森林's 'quoted' _x_\n") == [
        "Don't", "  ", "stop", ":", " ", "3rd", " ", "森林's", " ", "'", "quoted", "'", " ", "_", "x", "_", "\n"
    ]  # fmt: skip
    assert splitter("space").findall("a</w>b  <c> </w></w>\t<<") == [
        "a", "<", "/w>b", "  ", "<c>", " ", "<", "/w>", "<", "/w>", "\t", "<<"
    ]  # fmt: skip


@quick
@given(st.text(st.sampled_from("ab \n</w>\u3000\x1c"), max_size=20))
def test_no_piece_holds_an_end_mark_or_white_space_beside_something_visible(text):
    classes = character_classes()
    for piece in splitter("space").findall(text):
        assert "</w>" not in piece
        assert len({classes[ord(character)] == 3 for character in piece}) == 1


def test_a_word_has_letters_and_numbers_only(texts):
    classes = character_classes()
    for text in texts(1500, seed=4):
        for piece in splitter("word").findall(text):
            kinds = {classes[ord(character)] for character in piece.replace("'", "").replace("\u2019", "")}
            assert kinds <= {1, 2} or kinds == {3} or len(piece) == 1


# ---- the C core ----


@compiled
@pytest.mark.parametrize("name", core.IN_CORE)
def test_the_core_splits_as_python_does(name, texts, byte_texts):
    number, classes = core.IN_CORE.index(name), character_classes()
    for data in [text.encode() for text in texts(1500, seed=5)] + byte_texts(2000, seed=6):
        assert core.fast.split(data, classes, number) == list(core._pieces(data, name))

    @quick
    @given(st.binary(max_size=30) | st.text(max_size=30).map(str.encode))
    def on_any(data):
        assert core.fast.split(data, classes, number) == list(core._pieces(data, name))

    on_any()


@compiled
@pytest.mark.parametrize("name", core.IN_CORE)
def test_the_core_knows_the_class_of_every_character(name):
    """Each character once, between an a and a 1: the pieces show what it is taken for."""
    rng = random.Random(0)
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000 and (code < 0x3000 or rng.random() < 0.03)]
    data = "".join(f"a{chr(code)}1 " for code in codes).encode()
    assert core.fast.split(data, character_classes(), core.IN_CORE.index(name)) == list(core._pieces(data, name))
