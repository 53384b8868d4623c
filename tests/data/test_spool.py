"""The spool: documents on disk are the documents that came in, in little memory, and nothing is left over."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.data import documents as on_disk
from quire.data.reading import DataSettings, read
from quire.data.spool import Corpus, Spool

TEXT = st.text(st.sampled_from("ab é森\n"), max_size=8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QUIRE_CACHE", str(folder))
    return folder


@given(st.lists(st.lists(TEXT, min_size=1, max_size=4), max_size=6), st.integers(1, 7))
def test_documents_in_pieces_are_the_documents(pieces, block):
    texts = [text for parts in pieces if (text := "".join(parts)) and not text.isspace()]
    spool = Spool()
    spool.add_pieces((part, number == len(parts)) for parts in pieces for number, part in enumerate(parts, 1))
    documents = spool.finish()
    assert spool.digest() == Corpus.of(texts).digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_disk, "BLOCK", block)
        patch.setattr(on_disk, "ROWS", 2)
        assert list(documents) == texts and len(documents) == len(texts)
        assert list(documents[1:3]) == texts[1:3] and list(documents[-1:]) == texts[-1:]
        assert "".join(documents.texts()) == "".join(texts)
        begins = [begins for begins, _ in documents.pieces()]
        assert sum(begins) == len(texts)
        sizes = documents.sizes
    assert sizes == (len("".join(texts).encode()), len("".join(texts)), max(map(len, texts), default=0))


@given(st.lists(TEXT, min_size=1), st.lists(TEXT))
def test_other_documents_have_another_digest(one, other):
    kept = [[text for text in texts if text and not text.isspace()] for texts in (one, other)]
    assert (Corpus.of(one).digest == Corpus.of(other).digest) == (kept[0] == kept[1])


@given(st.lists(TEXT, max_size=5), st.lists(TEXT, max_size=5), st.lists(TEXT, max_size=5))
def test_what_is_taken_back_leaves_no_trace(one, dropped, other):
    spool = Spool()
    spool.add(one)
    before = spool.tally.copy()
    spool.add(dropped)
    spool.add_pieces((text, False) for text in dropped)
    spool.back_to(before)
    spool.add(other)
    expected = Corpus.of([*one, *other])
    assert list(spool.finish()) == list(expected.documents) and spool.digest() == expected.digest


@given(st.lists(st.sampled_from(["a", "b", "aa", "é", "ab"]), max_size=12), st.lists(st.sampled_from(["a", "é", "x"])))
def test_documents_that_are_held_out_are_left_out(texts, held_out):
    corpus, middle = Corpus.of(texts), len(texts) // 2
    corpus.arguments = [("one", 0, middle), ("two", middle, len(texts))]
    before = corpus.digest
    count = corpus.leave_out(Corpus.of(held_out).documents.marks())
    expected = [text for text in texts if text not in held_out]
    assert list(corpus.documents) == expected and count == len(texts) - len(expected)
    parts = [list(corpus.documents[first:last]) for _, first, last in corpus.arguments]
    assert parts == [[text for text in part if text not in held_out] for part in (texts[:middle], texts[middle:])]
    assert (corpus.digest == before) == (count == 0)


def test_the_spool_goes_when_it_is_closed_or_forgotten(cache):
    corpus = Corpus.of(["text"])
    documents = corpus.documents
    del corpus
    assert list(documents) == ["text"]  # whoever needs the documents keeps them
    assert len(list((cache / "spool").iterdir())) == 2  # a folder and its lock
    del documents
    assert list((cache / "spool").iterdir()) == []
    Corpus.of(["text"]).close()
    assert list((cache / "spool").iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_uses_is_not(cache):
    script = "import os, quire.data.spool as s; c = s.Corpus.of(['text']); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    place = cache / "spool"
    if os.name != "nt":
        assert (len([path for path in place.iterdir() if path.is_dir()])) == 1
    living = Corpus.of(["mine"])
    other = Corpus.of(["yours"])
    used = {corpus.documents.text.parent.name for corpus in (living, other)}
    assert {path.name for path in place.iterdir() if path.is_dir()} == used
    assert list(living.documents) == ["mine"] and list(other.documents) == ["yours"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.txt", "file"), ("a.txt", "line"), ("a.txt", "blank-line"), ("a.txt.gz", "<>"), ("a.jsonl", "file")],
)
def test_a_large_file_is_never_in_memory_whole(tmp_path, name, kind):
    paragraph = "Ein Absatz, nicht lang, mit Umlauten: süß, öde, über.\n" * 20 + "\n"
    if kind == "line":
        paragraph = paragraph.replace("\n", " ") + "\n"
    if name == "a.jsonl":
        paragraph = json.dumps({"text": paragraph}) + "\n"
    data = paragraph.encode() * (24_000_000 // len(paragraph))
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    size = len(data)
    del data
    tracemalloc.start()
    corpus = read([str(tmp_path / name)], DataSettings(documents=kind))
    seen = sum(len(text) for text in corpus.documents.texts())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen > 0.8 * corpus.documents.sizes[1] and corpus.documents.sizes[0] > 0.5 * size
    assert peak < size / 2


def test_the_index_is_read_in_parts(monkeypatch):
    texts = [f"document {number}" for number in range(1000)]
    corpus = Corpus.of(texts)
    monkeypatch.setattr(on_disk, "ROWS", 7)
    assert list(corpus.documents) == texts
    assert [len(rows) for _, rows in corpus.documents.chunks()] == [7] * 142 + [6]
