"""Bytes to text in blocks gives what decoding them at once gives, errors included."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.data.decoding import decoded
from quire.errors import UserError

ENCODINGS = ["utf-8", "utf-16-le", "utf-32-be", "cp1252", "shift_jis", "gb18030", "iso2022_jp", "utf-7"]
LINES = st.lists(st.sampled_from(["a", "é", "森", "\r", "\n", "\r\n", "\x1a", " "]), max_size=20).map("".join)


def in_blocks(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def expected(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\x1a")


@given(LINES, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030", "shift_jis"]), st.integers(1, 9))
def test_blocks_of_any_size_give_the_same_text(text, encoding, size):
    data = text.encode(encoding, "replace")
    how = "latin-1" if encoding in ("utf-8-sig", "utf-16", "utf-32") else encoding  # their marks say what they are
    assert "".join(decoded("a", in_blocks(data, size), how, "strict")) == expected(data.decode(encoding))


@given(st.binary(max_size=40).filter(lambda data: b"\0" not in data), st.sampled_from(ENCODINGS), st.integers(1, 9))
def test_bad_bytes_are_replaced_or_named_as_if_read_at_once(data, encoding, size):
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"%PDF-")):
        return
    blocks = in_blocks(data, size)
    if encoding != "iso2022_jp":  # whose replacements depend on where the decoder takes up again
        assert "".join(decoded("a", blocks, encoding, "replace")) == expected(data.decode(encoding, "replace"))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        with pytest.raises(UserError, match=rf"the byte at offset {error.start} \(0x{data[error.start]:02x}\)"):
            list(decoded("a", blocks, encoding, "strict"))
    else:
        assert "".join(decoded("a", blocks, encoding, "strict")) == expected(text)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 9))
def test_a_zero_byte_anywhere_is_said_before_a_bad_byte(zero, bad, size):
    data = bytearray(b"a" * 61)
    data[bad], data[zero] = 0xFF, 0
    with pytest.raises(UserError, match="is a binary file"):
        list(decoded("a", in_blocks(bytes(data), size), "utf-8", "strict"))


@pytest.mark.parametrize("size", [1000, 1 << 16, 1 << 20])
def test_the_likely_encoding_is_told_by_what_stands_around_the_bad_byte(size):
    russian = "Все счастливые семьи похожи друг на друга.\n" * 40
    data = b"x\n" * 100_000 + russian.encode("cp1251") + b"y\n" * 100_000
    with pytest.raises(UserError) as failed:
        list(decoded("a", in_blocks(data, size), "utf-8", "strict"))
    assert re.search(r"offset 200000 \(0xc2\).*--encoding cp1251", str(failed.value))
