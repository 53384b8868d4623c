"""From documents to token streams: what is held out, what is kept, and what is said of too little text."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.data import prepare as preparing
from quire.data.encode import stream
from quire.data.prepare import Prepared, prepare
from quire.data.reading import DataSettings, read
from quire.data.spool import Corpus
from quire.errors import UserError
from quire.tokenizers import TOKENIZERS, CharacterTokenizer

quick = settings(max_examples=80, deadline=None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepared(folder: Path, validation: Path | None = None, documents: str = "file") -> Prepared:
    """What `quire train FOLDER` prepares."""
    how = DataSettings(text=(str(folder),), documents=documents)
    held_out = read([str(validation)], how) if validation is not None else None
    return prepare(read(how.text, how), "character", held_out)


def split(documents: list[str]) -> tuple[list[str], list[str], str]:
    """As prepare.split does, in lists."""
    corpus = Corpus.of(documents)
    assert list(corpus.documents) == documents
    training, held_out, how = preparing.split(corpus.documents)
    for part in (training, held_out):
        whole = list(part)
        assert part.sizes == (
            len("".join(whole).encode()), len("".join(whole)), max(map(len, whole), default=0)
        ) and len(part) == len(whole)  # fmt: skip
    return list(training), list(held_out), how


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda text: text.strip())


# ---- the held-out text ----


@quick
@given(st.lists(TEXTS, max_size=40))
def test_nothing_is_lost_or_doubled(documents):
    before = list(documents)
    training, held_out, how = split(documents)
    assert documents == before
    assert "".join(training + held_out) == "".join(documents)
    assert all(training) and all(held_out)
    total, aside = len("".join(documents)), len("".join(held_out))
    assert aside <= max(total / 10, max(map(len, documents)) if len(documents) >= 20 else 0)
    if "document" in how:
        assert training + held_out == documents  # none is cut
        assert len(documents) >= 20 and held_out
        assert aside + len(training[-1]) > total / 10  # and none more would fit
    else:
        assert aside == total // 10
        assert len(training) + len(held_out) <= len(documents) + 1


def test_one_text_gives_its_last_tenth():
    text = "".join(chr(97 + i % 26) for i in range(1005))
    assert split([text])[:2] == ([text[:905]], [text[905:]])


def test_at_most_256_000_characters():
    text = "abcdefgh" * 400_000
    training, held_out, how = split([text])
    assert (len(held_out[0]), training[0] + held_out[0]) == (256_000, text)
    assert how == "the last 8% of the text"


def test_a_tenth_may_hold_several_documents_and_part_of_one():
    training, held_out, _ = split(["a" * 85, "b" * 8, "c" * 4, "d" * 3])
    assert training == ["a" * 85, "b" * 5]
    assert held_out == ["b" * 3, "c" * 4, "d" * 3]


def test_whole_documents_from_twenty_on():
    documents = [chr(97 + i) * 10 for i in range(20)]
    assert split(documents)[1] == documents[-2:]
    assert split(documents) == (documents[:-2], documents[-2:], "the last 2 documents")
    assert split(documents[:19])[1] == [documents[17][-9:], documents[18]]  # 19 are too few: the last 19 characters


def test_at_least_one_document_and_none_beyond_a_tenth():
    documents = ["a"] * 30 + ["b" * 3]  # the last is just within a tenth of the 33 characters
    assert split(documents)[1] == ["b" * 3]
    assert split(["a"] * 30 + ["b" * 4])[1] == ["b" * 3]  # beyond: the last characters instead
    uneven = ["a" * 100] * 18 + ["b" * 90, "c" * 195]  # the one before would not fit beside the last
    assert split(uneven)[1] == ["c" * 195]


def test_whole_documents_stop_at_256_000_characters():
    documents = ["x" * 100_000] * 40
    training, held_out, _ = split(documents)
    assert (len(training), len(held_out)) == (38, 2)
    assert len(split(["x" * 300_000] * 30)[1]) == 1  # at least one, even beyond


# ---- streams ----


@quick
@given(st.lists(TEXTS, min_size=1, max_size=6))
def test_a_stream_is_separators_and_documents(documents):
    tokenizer = CharacterTokenizer.train(documents)
    ids = np.concatenate(list(stream(tokenizer, Corpus.of(documents).documents.pieces())))
    expected = [token for text in documents for token in [tokenizer.separator, *tokenizer.encode(text)]]
    assert ids.tolist() == expected
    assert ids.dtype == np.int32


def write_documents(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def test_prepared_streams_are_the_text(tmp_path):
    texts = [f"Dokument {i}: süß\n" * 3 for i in range(25)]
    found = prepared(write_documents(tmp_path / "texts", texts))
    tokenizer = found.tokenizer
    assert found.training[0] == found.validation[0] == tokenizer.separator
    assert tokenizer.decode(np.concatenate([found.training, found.validation])) == "".join(texts)
    held_out = "".join(texts[23:])
    assert tokenizer.decode(found.validation) == held_out
    assert found.validation_bytes == len(held_out.encode()) > len(held_out)
    report = found.report
    assert (report["documents"], report["training_documents"]) == (25, 23)
    assert report["characters"] == len("".join(texts))
    assert report["tokens"] == len("".join(texts)) + 25
    assert report["vocabulary"] == len(set("".join(texts))) + 2
    assert "25 documents" in str(found) and "the last 2 documents" in str(found)


def test_a_validation_text_is_taken_whole(tmp_path):
    folder = write_documents(tmp_path / "texts", ["abc " * 50])
    (tmp_path / "other.txt").write_text("xyz " * 20, encoding="utf-8")
    found = prepared(folder, tmp_path / "other.txt")
    assert found.tokenizer.decode(found.training) == "abc " * 50
    assert found.tokenizer.decode(found.validation) == "xyz " * 20
    assert found.report["documents"] == 2


def test_the_second_time_comes_from_the_cache(tmp_path, monkeypatch):
    folder = write_documents(tmp_path / "texts", ["The same text, many times over.\n" * 40])
    first = prepared(folder)

    def fail(*_: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(preparing, "_encode", fail)
    second = prepared(folder)
    assert np.array_equal(first.training, second.training)
    assert np.array_equal(first.validation, second.validation)
    assert (second.report, second.validation_bytes) == (first.report, first.validation_bytes)
    assert second.tokenizer.to_table() == first.tokenizer.to_table()
    moved = (folder / "000.txt").rename(tmp_path / "elsewhere.txt")  # the content counts, not the place
    assert np.array_equal(prepared(moved).training, first.training)
    for change in (lambda: prepared(moved, documents="line"), lambda: prepared(moved, moved)):
        with pytest.raises(AssertionError, match="prepared again"):
            change()
    moved.write_text("The same text, with one word more.\n" * 40, encoding="utf-8")
    with pytest.raises(AssertionError, match="prepared again"):
        prepared(moved)


def test_the_same_bytes_read_in_another_way_are_another_text(tmp_path):
    lines = "".join(f'{{"text": "line number {i}"}}\n' for i in range(60))
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    plain, records = prepared(tmp_path / "a.txt"), prepared(tmp_path / "a.jsonl")
    assert plain.report["documents"] == 1
    assert records.report["documents"] == 60


@pytest.mark.parametrize("damage", [lambda data: data[:-4], lambda data: bytes([data[0] ^ 1]) + data[1:]])
def test_a_damaged_cache_is_made_anew(tmp_path, cache, damage):
    folder = write_documents(tmp_path / "texts", ["The same text, many times over.\n" * 40])
    before = prepared(folder).training[:].copy()
    (tokens,) = cache.glob("tokens/*/training-00000.bin")
    tokens.write_bytes(damage(tokens.read_bytes()))
    assert np.array_equal(prepared(folder).training, before)


def test_a_tokenizer_is_fitted_to_the_training_part_once_for_each_size(monkeypatch):
    fitted: list[tuple[str, int]] = []

    class Counting(CharacterTokenizer):
        kind = "counting"

        @classmethod
        def train(cls, texts, vocabulary_size=0):
            fitted.append(("".join(texts), vocabulary_size))
            return cls("ab"[: vocabulary_size or 2])

    monkeypatch.setitem(TOKENIZERS, "counting", Counting)
    for size in (0, 2, 0, 2):
        found = prepare(Corpus.of(["a" * 600]), "counting", None, size)
        assert found.tokenizer.vocabulary_size == 4
    assert fitted == [("a" * 540, 0), ("a" * 540, 2)]
    prepare(Corpus.of(["a" * 601]), "counting")
    assert fitted[2:] == [("a" * 541, 0)]


def test_a_fitted_tokenizer_finds_its_tokens_again(tmp_path, cache):
    """As a resume does, which has the tokenizer's file: nothing is encoded a second time."""
    first = prepare(Corpus.of(["abc" * 200]), "character")
    first.tokenizer.save(tmp_path / "tokenizer.json")
    prepare(Corpus.of(["abc" * 200]), str(tmp_path / "tokenizer.json"))
    assert len(list(cache.glob("tokens/*/index.json"))) == 1


# ---- too little ----


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a" * 499, "The text has 499 characters: too short to hold out a tenth"),
        ("a", "Give at least 500, or a separate --validation FILE"),
        ("", "There is no text to train on"),
    ],
)
def test_too_short_a_text(text, sentence):
    corpus = Corpus.of([text] if text else [])
    with pytest.raises(UserError, match=sentence):
        prepare(corpus, "character")
    assert len(prepare(Corpus.of(["a" * 500]), "character").validation) == 51


def test_too_short_a_validation_text():
    corpus = Corpus.of(["a" * 90])
    with pytest.raises(UserError, match="The held-out text has fewer than 50 characters"):
        prepare(corpus, "character", Corpus.of(["b" * 49]))
    assert len(prepare(corpus, "character", Corpus.of(["b" * 50])).validation) == 51


def test_a_tokenizer_to_use_as_it_is(tmp_path):
    CharacterTokenizer.train(["abcdefgh"]).save(tmp_path / "tokenizer.json")
    found = prepare(Corpus.of(["abc" * 200]), str(tmp_path / "tokenizer.json"))
    assert found.tokenizer.to_table() == {"characters": list("abcdefgh")}
    with pytest.raises(UserError, match=r"lacks 1: 'x' \(200\)\. Say --unknown grow"):
        prepare(Corpus.of(["abx" * 200]), str(tmp_path / "tokenizer.json"))
