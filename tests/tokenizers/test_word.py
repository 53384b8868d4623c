"""The word tokenizer: the most frequent words, and spelling for the others."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import UserError
from quire.tokenizers import WordTokenizer
from quire.tokenizers.patterns import splitter
from quire.tokenizers.word import FIRST_BYTE, FIRST_PIECE

quick = settings(max_examples=150, deadline=None)
words = st.text(st.sampled_from("ab  \n'.森é"), max_size=60)


@quick
@given(words, st.text(max_size=40), st.integers(1, 30))
def test_any_text_comes_back_whatever_the_training(training, text, room):
    tokenizer = WordTokenizer.train([training], FIRST_PIECE + room)
    ids = tokenizer.encode(text, special="text")
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocabulary_size <= FIRST_PIECE + room


@quick
@given(st.lists(words, max_size=3), st.integers(1, 20))
def test_the_most_frequent_come_first(parts, room):
    """Of characters and of words, each counted by hand; those equally frequent in the order of code points."""
    tokenizer = WordTokenizer.train(parts, FIRST_PIECE + room)
    count = Counter(piece for part in parts for piece in splitter("word").findall(part))
    letters = Counter("".join(parts))
    longer = {piece: number for piece, number in count.items() if len(piece) > 1 and number > 1}
    singles = [piece for piece in tokenizer.pieces if len(piece) == 1]
    several = [piece for piece in tokenizer.pieces if len(piece) > 1]
    assert tokenizer.pieces == singles + several
    assert singles == sorted(letters, key=lambda c: (-letters[c], c))[: max(1, room // 2)]
    assert several == sorted(longer, key=lambda w: (-longer[w], w))[: room - len(singles)]
    if len(longer) >= room - len(singles):
        assert tokenizer.vocabulary_size == FIRST_PIECE + room


def test_unseen_words_are_spelled_by_characters_and_unseen_characters_by_bytes():
    tokenizer = WordTokenizer.train(["to be or not to be"])
    names = [tokenizer.name(i) for i in tokenizer.encode("to bet, ober")]
    assert names == ["to", " ", "b", "e", "t", ",", " ", "o", "b", "e", "r"]
    assert tokenizer.encode(",") == [FIRST_BYTE + ord(",")]
    assert tokenizer.encode("森") == [FIRST_BYTE + byte for byte in "森".encode()]
    assert tokenizer.encode("be") == [FIRST_PIECE + tokenizer.pieces.index("be")]
    assert all(len(tokenizer.encode(word)) == 1 for word in ("to", "be", " "))


def test_a_word_that_occurs_once_is_not_worth_a_token():
    tokenizer = WordTokenizer.train(["once twice twice"])
    assert "twice" in tokenizer.pieces and "once" not in tokenizer.pieces


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="--vocabulary-size 258 is too small for a word tokenizer: 258"):
        WordTokenizer.train(["a"], 258)
    assert WordTokenizer.train(["a"], 259).pieces == ["a"]
