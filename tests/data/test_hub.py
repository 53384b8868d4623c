"""Datasets of the Hugging Face hub, with a library that stands in for `datasets`, and with the real one offline."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from quire.data.corpora import CORPORA
from quire.data.hub import hub_documents
from quire.data.reading import DataSettings, read
from quire.errors import UserError

ROWS = [{"text": "one", "id": 1}, {"text": None, "id": 2}, {"text": " \n", "id": 3}, {"text": "zwölf", "id": 4}]
SHA256 = hashlib.sha256(b"".join(len(d).to_bytes(8, "little") + d for d in (b"one", b" \n", "zwölf".encode())))


class Rows(list):
    """What load_dataset gives while streaming."""

    column_names = None

    def select_columns(self, names):
        return Rows({name: row[name] for name in names} for row in self)


class Stream:
    """Rows that are made as they are asked for."""

    column_names = None

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return self.rows


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A stand-in for the library: `library.rows` is what it loads, `library.asked` what it was asked for."""
    stand_in = SimpleNamespace(rows=Rows(ROWS), asked=[])

    def load_dataset(*names, **options):
        stand_in.asked.append((names, options))
        if isinstance(stand_in.rows, Exception):
            raise stand_in.rows
        return stand_in.rows

    stand_in.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))  # where the first hash of each is recorded
    return stand_in


@pytest.mark.parametrize("columns", [None, ["text", "id"]])
def test_a_dataset_is_a_document_a_row(library, columns):
    library.rows.column_names = columns
    corpus = read(["hf:owner/some.name"], DataSettings())
    assert list(corpus.documents) == ["one", "zwölf"]
    assert corpus.origins == [{"path": "hf:owner/some.name", "sha256": SHA256.hexdigest(), "bytes": 11}]
    options = {"split": "train", "revision": None, "streaming": True}
    assert library.asked == [(("owner/some.name", None), options)]


def test_the_hash_of_the_first_reading_is_checked_from_then_on(library):
    def origin():
        return read(["hf:a/b"], DataSettings()).origins

    first = origin()
    assert origin() == first
    library.rows = Rows([{"text": "onezw"}, {"text": "ölf"}, {"text": " \n"}])  # the same characters, cut elsewhere
    with pytest.raises(UserError, match=r"hf:a/b .* gives another text than when it was first read.* delete .*\.json"):
        origin()


def test_options_in_the_name(library):
    library.rows = Rows([{"body": "text"}])
    name = "hf:a/b?config=en&split=test[:10]&field=body&revision=v1"
    assert list(read([name], DataSettings(text_field="other")).documents) == ["text"]
    options = {"split": "test[:10]", "revision": "v1", "streaming": True}
    assert library.asked == [(("a/b", "en"), options)]
    assert list(read(["hf:a/b"], DataSettings(text_field="body")).documents) == ["text"]


def test_it_streams(library):
    """Nothing is asked for before the first document is wanted, and no row before its turn."""
    taken = []
    library.rows = Stream(taken.append(number) or {"text": "x" * 300_000} for number in range(9))
    seen = []
    origin, documents = hub_documents("hf:a/b", "text", lambda done, total: seen.append((done, total)))
    assert library.asked == [] and set(origin) == {"path"}
    next(documents)
    assert taken == [0]
    assert len(list(documents)) == 8 and origin["bytes"] == 2_700_000
    assert seen[0] == (300_000, None) and seen[-1] == (2_700_000, None)


def test_openwebtext_is_one_by_name(library):
    corpus = read(["openwebtext"], DataSettings(text_field="other"))
    assert list(corpus.documents) == ["one", "zwölf"] and corpus.origins[0]["path"] == "openwebtext"
    assert corpus.attributions == [CORPORA["openwebtext"].attribution]
    assert library.asked[0][0] == ("Skylion007/openwebtext", None)


@pytest.mark.parametrize(
    ("name", "rows", "match"),
    [
        ("hf:nobody", ROWS, "'hf:nobody' names no dataset.*Say hf:OWNER/NAME"),
        ("hf:", ROWS, "names no dataset"),
        ("hf:a/b/c", ROWS, "names no dataset"),
        ("hf:../b", ROWS, "names no dataset"),
        ("hf:a/b?splitt=test", ROWS, "'splitt' is not an option. Did you mean split?"),
        ("hf:a/b?field=body", ROWS, r"no field 'body' \(there: text, id\). Say hf:a/b\?field=body&field=NAME"),
        ("hf:a/b?field=id", ROWS, "the field 'id' is not a string"),
        ("hf:a/b", [{"id": 1}], r"no field 'text' \(there: id\). Say hf:a/b\?field=NAME"),
        ("hf:a/b", [], "hf:a/b holds no text"),
        ("hf:a/b", [{"text": None}, {"text": " "}], "holds no text"),
        ("hf:a/b", FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "doesn't exist.*Check its name"),
        ("hf:a/b", ConnectionError("Couldn't reach the Hub\n (offline)"), r"Couldn't reach the Hub \(off.*is online"),
        ("hf:a/b", ValueError("Config name is missing."), "Config name is missing. Check.*config"),
        ("hf:a/b", RuntimeError(""), "RuntimeError. Check"),
    ],
)
def test_what_cannot_be_had(library, name, rows, match):
    library.rows = rows if isinstance(rows, Exception) else Rows(rows)
    with pytest.raises(UserError, match=match):
        read([name], DataSettings())


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:a/b needs the library datasets: pip install datasets"):
        read(["hf:a/b"], DataSettings())


def test_a_break_in_the_middle(library):
    def rows():
        yield {"text": "one"}
        raise OSError("the connection broke")

    library.rows = Stream(rows())
    with pytest.raises(UserError, match="could not be read from the Hugging Face hub: the connection broke"):
        read(["hf:a/b"], DataSettings())


# ---- the real library; a folder of the working directory stands in for the hub -------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    monkeypatch.chdir(tmp_path)


def test_with_the_real_library(offline):
    folder = Path("owner") / "poems"
    folder.mkdir(parents=True)
    for split, rows in {"train": ROWS, "test": [{"text": "held out", "id": 5}]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = read(["hf:owner/poems"], DataSettings())
    assert list(corpus.documents) == ["one", "zwölf"]
    assert corpus.origins[0]["sha256"] == SHA256.hexdigest()
    assert list(read(["hf:owner/poems?split=test"], DataSettings()).documents) == ["held out"]
    for name, match in {
        "?split=dev": "dev",
        "?config=fr": "fr",
        "?field=nope": r"no field 'nope' \(there: text, id\)",
        "?field=id": "'id' is not a string",
    }.items():
        with pytest.raises(UserError, match=match):
            read([f"hf:owner/poems{name}"], DataSettings())


def test_a_dataset_that_the_real_library_cannot_reach(offline):
    with pytest.raises(
        UserError, match=r"hf:owner/nowhere could not be read from the Hugging Face hub: .*Check its name"
    ):
        read(["hf:owner/nowhere"], DataSettings())
