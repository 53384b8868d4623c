"""Texts from .parquet files."""

import hashlib
import sys
from pathlib import Path

import pytest

from quire.data.parquet import ROWS
from quire.data.reading import DataSettings, read
from quire.errors import UserError


@pytest.fixture
def arrow():
    pytest.importorskip("pyarrow", reason="the extra [datasets] is not installed")
    import pyarrow
    import pyarrow.parquet

    return pyarrow


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(arrow, path: str, row_group_size: int | None = None, **columns) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    arrow.parquet.write_table(arrow.table(columns), path, row_group_size=row_group_size)
    return Path(path)


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_there_and_back(arrow, kind):
    texts = [f"Eule {number} \N{OWL}\r\n" for number in range(2 * ROWS + 5)]
    column = arrow.array([None, *texts, " "])
    kinds = {"string": arrow.string(), "large_string": arrow.large_string()}
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kinds[kind])
    path = written(arrow, "a.PARQUET", row_group_size=700, number=range(len(column)), text=column)
    corpus = read([str(path)], DataSettings())
    assert list(corpus.documents) == texts
    data = path.read_bytes()
    origin = {"path": str(path.absolute()), "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert corpus.origins == [origin]


def test_inside_a_folder_and_from_an_address(arrow, server):
    path = written(arrow, "folder/deep/b.parquet", body=["two", "three"])
    Path("folder/a.txt").write_text("one")
    settings = DataSettings(text_field="body")
    assert list(read(["folder"], settings).documents) == ["one", "two", "three"]
    assert list(read(["**/*.parquet"], settings).documents) == ["two", "three"]
    server.serve("/c.parquet?raw=1", path.read_bytes())
    corpus = read([server.address + "/c.parquet?raw=1"], settings)
    assert list(corpus.documents) == ["two", "three"] and corpus.origins[0]["bytes"] == path.stat().st_size


def test_named_twice(arrow):
    written(arrow, "a.parquet", text=["one"])
    corpus = read(["a.parquet", "a.parquet"], DataSettings())
    assert list(corpus.documents) == ["one"] and [why for _, why in corpus.skipped] == ["was named twice"]


def test_mistakes(arrow):
    written(arrow, "good.parquet", text=["one " * 50_000])
    data = Path("good.parquet").read_bytes()
    Path("cut.parquet").write_bytes(data[:-20])
    Path("empty.parquet").write_bytes(b"")
    Path("other.parquet").write_text("no parquet")
    Path("changed.parquet").write_bytes(data[:100] + bytes(len(data) - 200) + data[-100:])
    written(arrow, "rowless.parquet", text=arrow.array([], arrow.string()))
    written(arrow, "blank.parquet", text=["", " ", None])
    written(arrow, "numbers.parquet", text=[1, 2])
    written(arrow, "column.parquet", body=["one"], id=[1])
    written(arrow, "bytes.parquet", text=[b"one"])
    expected = {
        "cut": "is damaged, or not parquet",
        "empty": "is damaged, or not parquet",
        "other": "is damaged, or not parquet",
        "changed": "is damaged, or not parquet",
        "rowless": "holds no text",
        "blank": "holds no text",
        "numbers": "the column 'text' holds int64, not strings. Say --text-field",
        "column": r"has no column 'text' \(there: body, id\). Say --text-field",
        "bytes": "the column 'text' holds binary, not strings",
    }
    for name, match in expected.items():
        with pytest.raises(UserError, match=rf"{name}\.parquet:? .*{match}") as raised:
            read([f"{name}.parquet"], DataSettings())
        assert "\n" not in str(raised.value)


def test_without_the_library(monkeypatch):
    Path("a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"Reading .*a\.parquet needs pyarrow: pip install pyarrow"):
        read(["a.parquet"], DataSettings())
