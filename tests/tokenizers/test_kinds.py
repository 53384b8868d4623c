"""What every kind of tokenizer keeps to; a kind that is added is tested by its line in TOKENIZERS."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import UserError
from quire.tokenizers import TOKENIZERS, ByteBPETokenizer, CharacterTokenizer, Tokenizer, load_tokenizer
from quire.tokenizers.bpe import RULES, BPETokenizer
from quire.tokenizers.core import IN_CORE
from quire.tokenizers.tokenizer import PADDING, SEPARATOR, BytesTokenizer, cut_place

quick = settings(max_examples=50, deadline=None)
BOOK = "The owl calls upon a night,\nand speaks to none but café or 森;  rivers run below 12 'stones'.\n\n" * 3


def made(kind: str, parts: list[str], size: int = 600) -> Tokenizer:
    return TOKENIZERS[kind].train(parts, size)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, texts) -> Tokenizer:
    return made(request.param, [BOOK, *texts(300, seed=50)])


def known(tokenizer: Tokenizer, text: str) -> str:
    """The text, or what of it is in a vocabulary of characters: the other kinds know every text."""
    if isinstance(tokenizer, CharacterTokenizer):
        return "".join(character for character in text if character in tokenizer.characters)
    return text


def test_every_text_comes_back(tokenizer, texts):
    for text in (known(tokenizer, text) for text in [*texts(600, seed=51), BOOK, ""]):
        ids = tokenizer.encode(text, special="text")
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(np.array(ids, dtype=np.int64)) == text
        array = tokenizer.encode_array(text)
        assert array.dtype == np.int32 and array.tolist() == ids
        assert all(0 <= number < tokenizer.vocabulary_size for number in ids)
        assert not {tokenizer.separator, tokenizer.padding} & set(ids)

    @quick
    @given(st.text(max_size=40))
    def on_any(text):
        text = known(tokenizer, text)
        assert tokenizer.decode(tokenizer.encode(text, special="text")) == text

    on_any()


def test_saved_and_loaded_it_is_the_same(tokenizer, texts, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer) and again.vocabulary_size == tokenizer.vocabulary_size
    assert again.to_table() == tokenizer.to_table() and again.specials == tokenizer.specials
    for text in texts(300, seed=50):
        assert again.encode(text, special="text") == tokenizer.encode(text, special="text")
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_and_masked(tokenizer, texts, side):
    parts = ["", *texts(40, seed=50)]
    ids, mask = tokenizer.batch(parts, side)
    rows = [tokenizer.encode(text, special="text") for text in parts]
    assert ids.shape == mask.shape == (len(parts), max(map(len, rows)))
    for row, real, expected in zip(ids, mask, rows, strict=True):
        assert row[real].tolist() == expected and (row[~real] == tokenizer.padding).all()
        in_order = real if side == "left" else real[::-1]
        assert (np.diff(in_order.astype(int)) >= 0).all()


def test_special_tokens_only_by_choice(tokenizer):
    parts = [known(tokenizer, part) for part in ("The", " owl")]
    text = f"{parts[0]}{SEPARATOR}{parts[1]}{PADDING}"
    with pytest.raises(UserError, match="looks like a special token"):
        tokenizer.encode(text)
    first, second = (tokenizer.encode(part) for part in parts)
    ids = tokenizer.encode(text, special="token")
    assert ids == [*first, tokenizer.separator, *second, tokenizer.padding]
    assert tokenizer.decode(ids) == "".join(parts)
    assert tokenizer.encode("".join(parts), special="token") == tokenizer.encode("".join(parts))
    assert tokenizer.specials[SEPARATOR] == tokenizer.separator and tokenizer.specials[PADDING] == tokenizer.padding
    assert tokenizer.name(tokenizer.separator) == SEPARATOR and tokenizer.name(tokenizer.padding) == PADDING


def test_every_token_has_a_name_and_ids_outside_the_vocabulary_are_refused(tokenizer):
    assert all(isinstance(tokenizer.name(number), str) for number in range(tokenizer.vocabulary_size))
    for number in (-1, tokenizer.vocabulary_size, 10**9):
        with pytest.raises(UserError, match=f"below the vocabulary size {tokenizer.vocabulary_size}"):
            tokenizer.decode([number])


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    for text in ("ab\ud800c", "\udfff"):
        with pytest.raises(UserError, match=r"surrogate|lacks"):
            tokenizer.encode(text)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_reads_its_texts_once_and_depends_on_nothing_else(kind, texts):
    parts = [BOOK, *texts(60, seed=52)]
    one = TOKENIZERS[kind].train((text for text in parts), 500)
    assert one.to_table() == TOKENIZERS[kind].train(parts, 500).to_table()


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "character"])
@pytest.mark.parametrize("size", [259, 260, 261, 262, 263, 270, 300, 400])
def test_the_vocabulary_has_at_most_the_size_asked_for(kind, size, texts):
    for seed in (0,):
        parts = [BOOK, *texts(80, seed=53 + seed)]
        trained = TOKENIZERS[kind].train(parts, size)
        assert 258 <= trained.vocabulary_size <= size
        for text in parts:
            assert trained.decode(trained.encode(text, special="text")) == text


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "character"])
def test_a_vocabulary_without_room_is_refused(kind):
    with pytest.raises(UserError, match="--vocabulary-size 200 is too small for a"):
        TOKENIZERS[kind].train([BOOK], 200)


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "character"])
def test_nothing_to_train_on_still_gives_a_tokenizer(kind):
    trained = TOKENIZERS[kind].train([], 400)
    assert trained.decode(trained.encode("any 森\n")) == "any 森\n"


# ---- streams ----


def test_a_stream_shows_the_text_and_never_half_a_character(tokenizer, texts):
    rng = random.Random(1)
    for text in texts(300, seed=54):
        ids = tokenizer.encode(known(tokenizer, text), special="text")
        cut, mixed = ids[rng.randrange(len(ids) + 1) :], rng.sample(ids, len(ids))
        for row in (ids, cut, mixed, [*ids[:3], tokenizer.separator, *ids[1:]]):
            decoder, shown = tokenizer.decoder(), ""
            for number, token in enumerate(row, 1):
                shown += decoder.push(token)
                assert tokenizer.decode(row).startswith(shown)  # what is shown is never taken back
                if isinstance(tokenizer, BytesTokenizer) and row is ids:  # nothing whole is held back
                    whole = tokenizer.decode_bytes(row[:number]).decode("utf-8", "ignore")
                    assert shown == whole
            assert shown + decoder.finish() == tokenizer.decode(row)  # of what is cut off, as decode shows it


# ---- places to cut ----

SPACED = st.text(st.sampled_from("  \n\n\r\t\x0b\x1c\x85\xa0\u2028\u3000ab.'s1,<森é\u0301"), max_size=24)


def every_kind(parts: list[str]) -> list[Tokenizer]:
    kinds: list[Tokenizer] = [TOKENIZERS["word"].train(parts, 700), TOKENIZERS["character"].train(parts)]
    kinds += [BPETokenizer.train(parts, 900, rule) for rule in RULES]
    kinds += [ByteBPETokenizer.train(parts, 900, pattern) for pattern in IN_CORE]
    return kinds


@pytest.fixture(scope="module")
def kinds(texts) -> list[Tokenizer]:
    return every_kind([BOOK, *texts(400, seed=55), "".join(chr(c) for c in range(0x3100))])


def check_cuts(kinds: list[Tokenizer], text: str) -> int:
    """Cut where cut_place says, and at every other place that it would say of a shorter text."""
    places = {cut_place(text[:end]) for end in range(1, len(text) + 1)} - {0}
    for place in places:
        assert 0 < place < len(text)
    for tokenizer in kinds:
        if isinstance(tokenizer, CharacterTokenizer) and known(tokenizer, text) != text:
            continue
        whole = tokenizer.encode_array(text).tolist()
        for place in places:
            parts = [tokenizer.encode_array(part).tolist() for part in (text[:place], text[place:])]
            assert parts[0] + parts[1] == whole, (tokenizer.kind, text[:place], text[place:])
    return len(places)


def test_both_parts_of_a_cut_text_have_the_ids_of_the_whole(kinds, texts):
    rng = random.Random(2)
    letters = "  \n\n\r\t\x1c\x85\u3000ab.'s1<森\u0301"
    spaced = ["".join(rng.choices(letters, k=rng.randrange(2, 20))) for _ in range(600)]
    cuts = sum(check_cuts(kinds, text) for text in [*texts(200, seed=56), *spaced])
    assert cuts > 400

    @settings(max_examples=200, deadline=None)
    @given(SPACED)
    def on_white_space(text):
        check_cuts(kinds, text)

    on_white_space()


def test_a_place_to_cut_is_found_far_from_the_end_and_a_text_without_one_has_none(monkeypatch):
    longest = 1 << 20
    monkeypatch.setattr("quire.tokenizers.tokenizer.LONGEST_STRETCH", longest)
    assert cut_place("") == cut_place("ab") == cut_place("a \n\t") - 1 == 0
    assert cut_place("a b" + "x" * 10**5) == 1
    assert cut_place("a\nb" + "\n" * 10**5) == 2
    assert cut_place("\n\n  a") == 0
    assert cut_place("x" * longest) == 0
    assert cut_place("x" * (longest + 1)) == longest
