"""Byte-level BPE: tiktoken's ids, Hugging Face's ids, any bytes and back, and the same merges however it is trained."""

import multiprocessing
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import UserError
from quire.tokenizers import ByteBPETokenizer, core, pieces
from quire.tokenizers.byte_bpe import suggested_size
from quire.tokenizers.tokenizer import PADDING, SEPARATOR, cut_place

quick = settings(max_examples=50, deadline=None)
NAMES = ["gpt2", "cl100k"]
compiled = pytest.mark.skipif(core.fast is None, reason="the C core is not compiled")


def agree(ours, oracle, text):
    ids = ours.encode(text, special="text")
    assert ids == oracle.encode_ordinary(text)
    assert ours.decode(ids) == text


# ---- tiktoken ----


@pytest.mark.parametrize("pair", ["trained_pair", "published_pair"])
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_tiktokens(pair, name, texts, request):
    ours, oracle = request.getfixturevalue(pair)[name]
    for text in texts(700, seed=7):
        agree(ours, oracle, text)

    @quick
    @given(st.text(max_size=60))
    def on_any(text):
        agree(ours, oracle, text)

    on_any()


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_real_texts_are_tiktokens(name, published_pair, shared_texts):
    ours, oracle = published_pair[name]
    for file, whole in shared_texts:  # all of them whole: benchmarks/tokenizer_campaign.py
        text = whole[:200_000]
        ids = ours.encode_array(text)
        assert np.array_equal(ids, np.array(oracle.encode_ordinary(text))), file
        assert ours.decode(ids) == text, file


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_bytes_that_are_not_utf8_join_to_them(name, trained_pair, byte_texts, no_core):
    ours, _ = trained_pair[name]
    for data in byte_texts(1500, seed=8):
        assert ours.decode_bytes(ours.encode_bytes(data)) == data


@pytest.mark.parametrize("name", core.IN_CORE)
def test_any_bytes_come_back(name, byte_texts):
    ours = ByteBPETokenizer.train(["the bytes of a text, of any text\n" * 3], 300, name)
    for data in byte_texts(1500, seed=9, length=40):
        assert ours.decode_bytes(ours.encode_bytes(data)) == data

    @quick
    @given(st.binary(max_size=200))
    def on_any(data):
        ids = ours.encode_bytes(data)
        assert ours.decode_bytes(ids) == data
        assert ids.dtype == np.int32 and (not len(ids) or 0 <= ids.min() <= ids.max() < ours.vocabulary_size)

    on_any()


# ---- Hugging Face ----


@pytest.mark.parametrize("pair", ["trained_pair", "published_pair"])
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_hugging_faces(pair, name, texts, tmp_path, request):
    """Its reader takes the file that Quire saves; test_unicode_tables.py has the characters that may differ."""
    ours, _ = request.getfixturevalue(pair)[name]
    ours.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts(600, seed=10):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special="text") == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == text
    text = f"a{SEPARATOR}b" if pair == "trained_pair" else "a<|endoftext|>b"
    assert ours.encode(text, special="token") == theirs.encode(text, add_special_tokens=False).ids


# ---- special tokens ----


def test_what_looks_like_a_special_token_is_one_only_by_choice(trained_pair):
    ours, oracle = trained_pair["gpt2"]
    text = f"one{SEPARATOR} two{PADDING}{SEPARATOR}"
    with pytest.raises(UserError, match="looks like a special token"):
        ours.encode(text)
    assert ours.encode(text, special="text") == oracle.encode_ordinary(text)
    assert ours.encode(text, special="token") == oracle.encode(text, allowed_special="all")
    assert ours.decode(ours.encode(text, special="text")) == text
    assert ours.decode(ours.encode(text, special="token")) == "one two"
    assert not {ours.separator, ours.padding} & set(ours.encode_array(text).tolist())


def test_training_takes_special_tokens_for_plain_text():
    ours = ByteBPETokenizer.train([SEPARATOR * 50], 400)
    assert len(ours.encode(SEPARATOR, special="text")) < len(SEPARATOR)
    assert ours.separator not in ours.encode(SEPARATOR, special="text")
    assert ours.encode(SEPARATOR, special="token") == [ours.separator]


def test_of_overlapping_specials_the_first_and_of_those_the_longest_is_meant():
    bytes_ = [bytes([byte]) for byte in range(256)]
    specials = {"<a>": 256, "<a><b>": 257, "<b><c>": 258, "a>": 259}
    ours = ByteBPETokenizer([*bytes_, b"", b"", b"", b""], [], specials, "gpt2", "<a>", "<a>")
    assert ours.encode("<a>", special="token") == [256]
    assert ours.encode("<a><b>", special="token") == [257]
    assert ours.encode("<a><b><c>", special="token") == [257, *b"<c>"]
    assert ours.encode("x<b><c>a>", special="token") == [ord("x"), 258, 259]


# ---- training ----


@compiled
@pytest.mark.parametrize("name", core.IN_CORE)
def test_the_core_learns_and_encodes_as_the_reference_does(name, texts, monkeypatch):
    for seed in range(3):
        parts = texts(300, seed=20 + seed, length=15)
        fast = ByteBPETokenizer.train(parts, 700, name)
        ids = [fast.encode(text, special="text") for text in parts]
        with monkeypatch.context() as patched:
            patched.setattr(core, "fast", None)
            plain = ByteBPETokenizer.train(parts, 700, name)
            assert plain.merges == fast.merges
            assert [plain.encode(text, special="text") for text in parts] == ids
            assert [fast.encode(text, special="text") for text in parts] == ids


@compiled
def test_the_core_learns_from_real_text_as_the_reference_does(shared, monkeypatch):
    text = shared("wikitext2_valid.txt").read_text(encoding="utf-8")[:150_000]
    fast = ByteBPETokenizer.train([text], 4096)
    with monkeypatch.context() as patched:
        patched.setattr(core, "fast", None)
        plain = ByteBPETokenizer.train([text], 4096)
        assert plain.merges == fast.merges
        ids = plain.encode_array(text)
    assert np.array_equal(fast.encode_array(text), ids)
    assert fast.vocabulary_size == 4096


@compiled
@quick
@given(st.lists(st.binary(max_size=30), max_size=6), st.sampled_from(core.IN_CORE), st.integers(0, 30))
def test_the_core_learns_from_any_bytes_as_the_reference_does(parts, name, count):
    learned = core.learn(parts, name, count)
    with pytest.MonkeyPatch().context() as patched:
        patched.setattr(core, "fast", None)
        assert core.learn(parts, name, count) == learned


def blocks(text: str, rng: random.Random) -> list[str]:
    """The text in blocks that end at cut places, as it is read from a file."""
    found, held, at = [], "", 0
    while at < len(text):
        step = rng.randrange(1, 400)
        held, at = held + text[at : at + step], at + step
        if place := cut_place(held):
            found.append(held[:place])
            held = held[place:]
    return [*found, held]


@pytest.mark.parametrize("name", core.IN_CORE)
def test_training_does_not_depend_on_blocks_nor_on_threads(name, texts, monkeypatch):
    monkeypatch.setattr(pieces, "SHARE", 1000)  # so that small texts are shared among threads
    whole = "".join(texts(1200, seed=30))
    expected = ByteBPETokenizer.train([whole], 600, name, threads=1).merges
    for seed in range(4):
        parts = blocks(whole, random.Random(seed))
        assert "".join(parts) == whole and len(parts) > 20
        for threads in (1, 2, 5):
            assert ByteBPETokenizer.train(parts, 600, name, threads=threads).merges == expected


def test_the_vocabulary_is_as_large_as_asked_and_smaller_only_where_nothing_repeats():
    text = "a rose is a rose is a rose, and a daisy is none. " * 4
    for size in (258, 259, 270):
        assert ByteBPETokenizer.train([text], size).vocabulary_size == size
    assert ByteBPETokenizer.train(["abcdefgh"], 1000).vocabulary_size == 258
    assert ByteBPETokenizer.train([], 1000).vocabulary_size == 258
    with pytest.raises(UserError, match="--vocabulary-size 257 is too small"):
        ByteBPETokenizer.train([text], 257)
    with pytest.raises(UserError, match="--pattern"):
        ByteBPETokenizer.train([text], 300, "gtp2")


def test_a_suggested_size_grows_with_the_text():
    sizes = [suggested_size(10**power) for power in range(12)]
    assert sizes == sorted(sizes) and sizes[0] == 512 and sizes[6] == 2048 and sizes[-1] == 32768


@pytest.mark.usefixtures("no_core")
def test_all_of_it_works_without_the_core(trained_pair, texts):
    for name in NAMES:
        ours, oracle = trained_pair[name]
        for text in texts(600, seed=11):
            agree(ours, oracle, text)
        assert ByteBPETokenizer.train(["banana bandana"], 260, name).merges == [(97, 110, 256), (98, 256, 257)]


# ---- several threads, several processes ----


def test_threads_share_one_tokenizer(trained_pair, texts):
    from concurrent.futures import ThreadPoolExecutor

    ours, oracle = trained_pair["cl100k"]
    parts = texts(400, seed=12, length=60)
    expected = [oracle.encode_ordinary(text) for text in parts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert [ids.tolist() for ids in pool.map(ours.encode_array, parts)] == expected


def test_a_tokenizer_goes_to_another_process(trained_pair, texts):
    ours, oracle = trained_pair["gpt2"]
    parts = texts(20, seed=13)
    ours.encode_array("so that an encoder of the core is there")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.map(ours.encode_array, parts)
    assert [ids.tolist() for ids in there] == [oracle.encode_ordinary(text) for text in parts]
