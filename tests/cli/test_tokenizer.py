"""quire tokenizer: what goes in comes out, byte for byte, and each mistake has its sentence."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from quire.tokenizers import TOKENIZERS, load_tokenizer

ODD = "Zwölf Boxkämpfer\r\njagen  Eva\r\n\r\n\tquer <|separator|> über 森 🌲\n"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with book.txt, odd.txt, and a tokenizer of each kind fitted to both."""
    (tmp_path / "book.txt").write_text("the owl calls upon a night and speaks to none\n" * 40 + ODD, newline="")
    (tmp_path / "odd.txt").write_text(ODD, newline="")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_a_file_comes_back_as_it_was(desk: Path, quire, kind: str) -> None:
    trained = quire("tokenizer", "train", kind, "book.txt", "--vocabulary-size", "300", "--out", "t.json", "--json")
    assert json.loads(trained.out)["kind"] == kind
    text = ODD if kind != "character" else ODD.replace("\r\n", "\n")  # line ends of TEXT are \n: \r was never seen
    Path("odd.txt").write_text(text, newline="")
    ids = quire("tokenizer", "encode", "t.json", "odd.txt", "--json").out
    tokenizer = load_tokenizer("t.json")
    assert json.loads(ids) == {"ids": tokenizer.encode(text, special="text")}
    assert not {tokenizer.separator, tokenizer.padding} & set(json.loads(ids)["ids"])
    for written in (ids, json.dumps(json.loads(ids)["ids"])):
        Path("ids.json").write_text(written)
        assert json.loads(quire("tokenizer", "decode", "t.json", "ids.json", "--json").out) == {"text": text}


def test_the_special_token_only_by_choice(desk: Path, quire) -> None:
    quire("tokenizer", "train", "byte-bpe", "book.txt", "--vocabulary-size", "300", "--out", "t.json")
    separator = load_tokenizer("t.json").separator
    Path("s.txt").write_text("a<|separator|>b")
    encode = ("tokenizer", "encode", "t.json", "s.txt", "--json", "--special")
    plain, chosen, refused = (quire(*encode, how) for how in ("text", "token", "error"))
    assert separator not in json.loads(plain.out)["ids"] and separator in json.loads(chosen.out)["ids"]
    assert refused.code == 2 and "looks like a special token" in refused.err


def test_bytes_that_are_no_text_go_through_byte_bpe(desk: Path, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    quire("tokenizer", "train", "byte-bpe", "book.txt", "--vocabulary-size", "300", "--out", "t.json")
    data = bytes(range(256)) + b"\xff\xfe owl\x00"
    Path("data").write_bytes(data)
    Path("ids.json").write_text(quire("tokenizer", "encode", "t.json", "data", "--json").out)
    out = SimpleNamespace(buffer=io.BytesIO(), flush=lambda: None, write=lambda _: None)
    monkeypatch.setattr(sys, "stdout", out)
    from quire.cli.main import call

    assert call(["tokenizer", "decode", "t.json", "ids.json"]) == 0
    assert out.buffer.getvalue() == data


def test_a_rank_file_is_written_and_read(desk: Path, quire) -> None:
    said = quire("tokenizer", "train", "byte-bpe", "book.txt", "--vocabulary-size", "300", "--out", "t.tiktoken")
    assert said.code == 0
    refused = quire("tokenizer", "encode", "t.tiktoken", "odd.txt")
    assert refused.code == 2 and "rename it to t.gpt2.tiktoken or" in refused.err
    Path("t.tiktoken").rename("t.gpt2.tiktoken")
    read = quire("tokenizer", "encode", "t.gpt2.tiktoken", "odd.txt", "--json")
    quire("tokenizer", "train", "byte-bpe", "book.txt", "--vocabulary-size", "300", "--out", "t.json")
    assert read.out == quire("tokenizer", "encode", "t.json", "odd.txt", "--json").out


def test_compare_shows_figures_and_how_a_sentence_splits(desk: Path, quire) -> None:
    said = quire("tokenizer", "compare", "book.txt", "--vocabulary-size", "300", "--sentence", "the owl")
    assert said.code == 0
    assert all(any(line.split()[:1] == [kind] for line in said.out.splitlines()) for kind in TOKENIZERS)
    assert "t|h|e| |o|w|l|" in said.out
    found = json.loads(quire("tokenizer", "compare", "book.txt", "--vocabulary-size", "300", "--json").out)
    rows = {row["tokenizer"]: row for row in found["tokenizers"]}
    assert list(rows) == list(TOKENIZERS)
    for row in rows.values():
        assert row["bytes_per_token"] == pytest.approx(row["bytes"] / row["tokens"])
        assert 0 < row["vocabulary_used"] <= 1
    assert rows["byte-bpe"]["tokens"] < rows["character"]["tokens"]
    assert rows["character"]["unknown"] > 0 == rows["byte-bpe"]["unknown"]  # the odd line is in the last tenth alone


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("train", "required"),
        ("train sentence book.txt", "The tokenizer kind 'sentence' is not known"),
        ("train word", "Name a TEXT"),
        ("train word nowhere.txt", "There is no file, folder or corpus named 'nowhere.txt'"),
        ("train word book.txt --vocabulary-size 100", "--vocabulary-size 100 is too small for a word tokenizer"),
        ("train bpe book.txt --vocabulary-size 258", "--vocabulary-size 258 is too small for a bpe tokenizer"),
        ("train byte-bpe book.txt --vocabulary-size 257", "--vocabulary-size 257 is too small for a byte-bpe"),
        ("train byte-bpe book.txt --pattern gpt3", "--pattern 'gpt3' is not known"),
        ("train bpe book.txt --rule google", "--rule 'google' is not known"),
        ("train word book.txt --out .", ". is no file to write a tokenizer to"),
        ("train word book.txt --out -", "- is no file to write a tokenizer to"),
        ("train word book.txt --out book.txt", "book.txt exists already. Name another file with --out"),
        ("compare one.txt", "too short to compare"),
        ("train word book.txt --out t.tiktoken", "only a byte-bpe tokenizer can be written as ranks"),
        ("encode gpt3 book.txt", "There is no tokenizer at gpt3"),
        ("encode book.txt book.txt", "is damaged, or no tokenizer"),
        ("encode t.json nowhere.txt", "nowhere.txt cannot be read"),
        ("encode t.json binary", "binary is not UTF-8 text (at byte 0)"),
        ("decode t.json book.txt", "book.txt does not hold ids"),
        ("decode t.json words.json", "words.json does not hold ids"),
        ("decode t.json large.json", "Ids must be at least 0 and below the vocabulary size"),
        ("compare", "Name a TEXT"),
        ("compare book.txt --tokenizers gpt5", "There is no tokenizer at gpt5"),
        ("spell book.txt", "What to do with a tokenizer, 'spell' is not known"),
    ],
)
def test_mistakes(desk: Path, quire, words: str, sentence: str) -> None:
    quire("tokenizer", "train", "word", "book.txt", "--vocabulary-size", "300", "--out", "t.json")
    Path("binary").write_bytes(b"\xff\xfe\x00\x01")
    Path("words.json").write_text('{"ids": ["a"]}')
    Path("one.txt").write_text("a")
    Path("large.json").write_text("[0, 5000]")
    there = sorted(desk.iterdir())
    said = quire("tokenizer", *words.split())
    assert said.code == 2 and sentence in said.plain and "Traceback" not in said.err
    assert sorted(desk.iterdir()) == there
