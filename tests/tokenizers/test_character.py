"""The character tokenizer: loses nothing, keeps its order, and says what it does not know."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import UserError
from quire.tokenizers import CharacterTokenizer, load_tokenizer
from quire.tokenizers.tokenizer import PADDING, SEPARATOR

texts = st.text(min_size=1, max_size=60)
quick = settings(max_examples=60, deadline=None)


@quick
@given(texts)
def test_round_trip(text):
    tokenizer = CharacterTokenizer.train([text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert all(0 <= i < tokenizer.vocabulary_size for i in ids)
    assert tokenizer.padding not in ids and tokenizer.separator not in ids
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, ids)) == text
    assert tokenizer.encode_array(text).dtype == np.int32


@quick
@given(st.lists(texts, min_size=1, max_size=4), st.randoms())
def test_the_vocabulary_is_sorted_and_depends_on_the_characters_alone(parts, draw):
    tokenizer = CharacterTokenizer.train(parts)
    assert list(tokenizer.characters) == sorted(set("".join(parts)))
    assert tokenizer.vocabulary_size == len(set("".join(parts))) + 2
    shuffled = list("".join(parts) * 2)
    draw.shuffle(shuffled)
    assert CharacterTokenizer.train(shuffled).to_table() == tokenizer.to_table()


@quick
@given(texts)
def test_saved_and_loaded(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = CharacterTokenizer.train([text])
    tokenizer.save(folder / "tokenizer.json")
    for place in (folder, folder / "tokenizer.json"):
        loaded = load_tokenizer(place)
        assert isinstance(loaded, CharacterTokenizer)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.to_table() == tokenizer.to_table()


def test_the_file_is_json_and_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    CharacterTokenizer.train(["Zwölf Boxkämpfer 😀\n"]).save(path)
    whole = path.read_bytes()
    assert json.loads(whole)["kind"] == "character"
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
            load_tokenizer(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
            load_tokenizer(path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="There is no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")


# ---- characters that it does not know ----


def test_unknown_characters_are_named_with_their_positions():
    tokenizer = CharacterTokenizer.train(["abc "])
    with pytest.raises(UserError) as caught:
        tokenizer.encode("ab😀 ca£b😀")
    message = str(caught.value)
    assert "'😀' (U+1F600) at position 2" in message
    assert "'£' (U+00A3) at position 6" in message
    assert "--unknown skip" in message and "--unknown replace" in message
    with pytest.raises(UserError, match="and 3 more"):
        tokenizer.encode("abcdefghijk")


@quick
@given(texts, texts)
def test_every_text_is_encoded_skipped_replaced_or_refused(known, text):
    """Never a KeyError, and never a silent change."""
    tokenizer = CharacterTokenizer.train([known])
    missing = [place for place, c in enumerate(text) if c not in known]
    if missing:
        with pytest.raises(UserError, match=rf"at position {missing[0]}\b"):
            tokenizer.encode(text)
    else:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, "skip")) == "".join(c for c in text if c in known)


@pytest.mark.parametrize(
    ("known", "expected"),
    [("ab\ufffd?", "a\ufffdb\ufffd"), ("ab?_", "a?b?"), ("ab_ ", "a_b_"), ("ab ", "a b "), ("ab", "ab")],
)
def test_replace_writes_a_stand_in_that_is_known(known, expected):
    tokenizer = CharacterTokenizer.train([known])
    assert tokenizer.decode(tokenizer.encode("axby", "replace")) == expected


# ---- special tokens ----


def test_text_that_looks_like_a_special_token_is_plain_text_only_where_that_is_said():
    text = f"a{SEPARATOR}b{PADDING}"
    tokenizer = CharacterTokenizer.train([text])
    with pytest.raises(UserError, match="looks like a special token"):
        tokenizer.encode(text)
    a, b = tokenizer.encode("ab")
    assert tokenizer.encode(text, special="token") == [a, tokenizer.separator, b, tokenizer.padding]
    ids = tokenizer.encode(text, special="text")
    assert len(ids) == len(text)
    assert not {tokenizer.separator, tokenizer.padding} & set(ids)
    assert tokenizer.decode(ids) == text


def test_special_tokens_have_names_but_no_text():
    tokenizer = CharacterTokenizer.train(["ab"])
    a, b = tokenizer.encode("ab")
    assert tokenizer.decode([tokenizer.separator, a, tokenizer.padding, b, tokenizer.separator]) == "ab"
    assert tokenizer.decode([]) == ""
    assert len({tokenizer.padding, tokenizer.separator, a, b}) == 4
    assert [tokenizer.name(i) for i in (tokenizer.padding, tokenizer.separator, a)] == [PADDING, SEPARATOR, "a"]


@pytest.mark.parametrize("token", [-1, 4, 1_000_000])
def test_ids_outside_the_vocabulary_are_refused(token):
    tokenizer = CharacterTokenizer.train(["ab"])
    with pytest.raises(UserError, match="below the vocabulary size 4"):
        tokenizer.decode([2, token])


# ---- batches of texts ----


@quick
@given(st.lists(st.text(max_size=12), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_a_batch_is_padded_and_masked(parts, side):
    tokenizer = CharacterTokenizer.train([*parts, "x"])
    ids, mask = tokenizer.batch(parts, side)
    assert ids.shape == mask.shape == (len(parts), max(map(len, parts)))
    assert mask.dtype == bool
    for row, real, text in zip(ids, mask, parts, strict=True):
        assert tokenizer.decode(row[real]) == text == tokenizer.decode(row)
        assert (row[~real] == tokenizer.padding).all()
        in_order = real if side == "left" else real[::-1]
        assert (np.diff(in_order.astype(int)) >= 0).all()  # all padding stands on that side
