"""The tokenizer files of llama2.c: the published small one, one made here, and damaged ones."""

import re
import struct

import pytest

from quire.errors import UserError
from quire.tokenizers.llama2c import read_llama2c

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def written(pieces: list[str], scores: list[float] | None = None, longest: int = 0) -> bytes:
    """A file of such pieces."""
    encoded = [piece.encode() for piece in pieces]
    longest = longest or max(map(len, encoded), default=0)
    pairs = zip(scores or [0.0] * len(encoded), encoded, strict=True)
    return struct.pack("<i", longest) + b"".join(struct.pack("<fi", s, len(p)) + p for s, p in pairs)


SPECIAL = ["<unk>", "\n<s>\n", "\n</s>\n"]
LEARNED = {" a": -1.0, "bc": -2.0, " ": -3.0, "a": -4.0, "b": -5.0, "c": -6.0, "é": -7.0}
GOOD = written([*SPECIAL, *BYTES, *LEARNED], [0.0] * 259 + list(LEARNED.values()))


def test_the_story_of_the_published_model_is_its_150_tokens(shared):
    tokenizer = read_llama2c(shared("tok512.bin"), 512)
    lines = shared("golden_stories260K_greedy150.txt").read_text(encoding="utf-8").split("\n", 2)
    story = re.sub(r" ?[\d.]+\n*$", "", lines[2]).replace("<0x0A>", "\n").removeprefix(" ")
    ids = tokenizer.encode(story)
    assert len(ids) == 150 and tokenizer.decode(ids) == story and 13 in ids  # <0x0A>, the line end
    assert tokenizer.specials == {"<unk>": 0, "<s>": 1, "</s>": 2} and tokenizer.separator == 1
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, [1, *ids])) == story


def test_a_file_made_here(tmp_path):
    (tmp_path / "own.bin").write_bytes(GOOD)
    tokenizer = read_llama2c(tmp_path / "own.bin", 259 + len(LEARNED))
    assert [tokenizer.name(i) for i in tokenizer.encode("abc é\n")] == [" a", "bc", " ", "é", "\n"]
    assert tokenizer.decode(tokenizer.encode(" abc")) == " abc" and tokenizer.vocabulary_size == 266


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "cut.bin"
    for length in [*range(0, len(GOOD) - 100, 29), *range(len(GOOD) - 100, len(GOOD))]:
        path.write_bytes(GOOD[:length])
        with pytest.raises(UserError, match=r"cut\.bin"):
            read_llama2c(path, 266)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "at byte 4 begins no token"),
        (b"PK\x03\x04 an archive, or something else", "begins no token"),
        (bytes(4096), "begins no token"),
        (written(SPECIAL), "does not begin with <unk>"),
        (written(["<pad>", *SPECIAL[1:], *BYTES, "a"]), "does not begin with <unk>"),
        (written([*SPECIAL, *BYTES[::-1], "a"]), "does not begin with <unk>"),
        (written([*SPECIAL, *BYTES, "a", "a"]), "its piece 'a' stands there twice"),
        (written([*SPECIAL, *BYTES, "a"], [0.0] * 259 + [float("nan")]), "a score is not a number"),
        (written([*SPECIAL, *BYTES, "abcdef"], longest=3), "begins no token"),
        (GOOD.replace(struct.pack("<i", 2) + b"bc", struct.pack("<i", -2) + b"bc"), "begins no token"),
        (GOOD.replace(struct.pack("<i", 2) + b"bc", struct.pack("<i", 1 << 30) + b"bc"), "begins no token"),
        (GOOD.replace("é".encode(), b"\xff\xff"), "begins no token"),
    ],
)
def test_damaged_files(data, sentence, tmp_path):
    (tmp_path / "bad.bin").write_bytes(data)
    with pytest.raises(UserError, match=sentence) as caught:
        read_llama2c(tmp_path / "bad.bin")
    assert "bad.bin" in str(caught.value)


def test_one_that_is_missing_or_of_another_model(tmp_path):
    (tmp_path / "own.bin").write_bytes(GOOD)
    with pytest.raises(UserError, match="has 266 tokens, but the model 512: it belongs to another one"):
        read_llama2c(tmp_path / "own.bin", 512)
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(UserError, match="There is no tokenizer at"):
            read_llama2c(path)
