"""Texts from .bin files of GPT-2's tokens."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.data import token_files
from quire.data.reading import DataSettings, read
from quire.errors import UserError


class Numbers:
    """Stands in for GPT-2's tokenizer: its tokens are the words "id0", "id1" ..."""

    def decode(self, ids):
        return "".join(f"id{number} " for number in ids)


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_files, "load_tokenizer", lambda name: asked.append(name) or Numbers())
    yield
    assert set(asked) <= {"gpt2"}


def written(*ids: int) -> str:
    Path("train.bin").write_bytes(np.array(ids, dtype="<u2").tobytes())
    return "train.bin"


def test_a_document_between_the_marks():
    corpus = read([written(50256, 5, 300, 50256, 40000, 50256, 50256, 7)], DataSettings())
    assert list(corpus.documents) == ["id5 id300 ", "id40000 ", "id7 "]
    assert corpus.origins[0]["path"] == str(Path("train.bin").absolute()) and corpus.origins[0]["bytes"] == 16


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(256, 50255), max_size=9), min_size=1, max_size=9), st.integers(1, 12))
def test_however_the_blocks_fall(monkeypatch, documents, block):
    monkeypatch.setattr(token_files, "BLOCK", block)
    ids = [token for document in documents for token in (*document, 50256)]
    found = token_files.token_documents("train.bin", Path(written(*ids, 256)))
    assert list(filter(None, found)) == [*(Numbers().decode(part) for part in documents if part), "id256 "]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x01\x00\xff", "odd number of bytes"),
        (np.array([5, 50257], dtype="<u2").tobytes(), "holds the id 50257, which GPT-2 does not have"),
        (np.array([20240520, 1, 3], dtype="<i4").tobytes(), "holds the id 55432"),  # the header that llm.c writes
        (np.arange(65, dtype="<u2").tobytes(), "no id above 255: its tokens are not GPT-2's but perhaps characters"),
        (np.full(9, 50256, dtype="<u2").tobytes(), "holds no text"),
        (b"", "is empty"),
    ],
)
def test_files_that_are_no_tokens(data, match):
    Path("train.bin").write_bytes(data)
    with pytest.raises(UserError, match=rf"train\.bin.* {match}"):
        read(["train.bin"], DataSettings())


def test_a_text_by_the_name_of_bin_is_a_text():
    text = "Not tokens but 森 words.\n" * 9_000  # a character is cut where the first look at it ends
    Path("train.bin").write_text(text, newline="\n")
    assert list(read(["train.bin"], DataSettings()).documents) == [text]


def test_from_an_address_but_not_inside_folders(server, tmp_path):
    server.serve("/val.bin", Path(written(5, 300)).read_bytes())
    assert list(read([server.address + "/val.bin"], DataSettings()).documents) == ["id5 id300 "]
    with pytest.raises(UserError, match=r"holds no text.*not named like a text"):
        Path("folder").mkdir()
        Path("train.bin").rename("folder/train.bin")
        read(["folder"], DataSettings())
