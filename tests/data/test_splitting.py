"""Text to documents: by definitions on the whole text, whatever blocks it comes in."""

import re

from hypothesis import given
from hypothesis import strategies as st

from quire.data.splitting import split

SEPARATORS = {"line": "\n", "blank-line": "\n\n", "<|>": "<|>"}
PIECES = st.text(st.characters(exclude_characters="\n<|>")).filter(lambda piece: piece and not piece.isspace())


def splitted(blocks: list[str], kind: str) -> list[str]:
    """The documents of a text that comes in blocks."""
    found, parts = [], []
    for text, ends in split(blocks, kind):
        parts.append(text)
        if ends:
            found, parts = [*found, "".join(parts)], []
    assert not parts
    return [text for text in found if text and not text.isspace()]


@given(st.lists(PIECES, min_size=1), st.sampled_from(list(SEPARATORS)))
def test_what_is_joined_is_split_again(pieces, kind):
    text = SEPARATORS[kind].join(pieces)
    assert splitted([text], kind) == pieces


@given(st.text(st.sampled_from("ab<|> \t\n")), st.sampled_from(["file", *SEPARATORS]))
def test_splitting_loses_only_separators_and_whitespace(text, kind):
    pieces = splitted([text], kind)
    expected = text.replace(kind, "") if kind == "<|>" else text
    assert "".join("".join(pieces).split()) == "".join(expected.split())


@given(
    st.lists(st.text(st.sampled_from("ab<|> \t\n"), max_size=6), max_size=12),
    st.sampled_from(["file", *SEPARATORS, "aba", "aa"]),
)
def test_documents_are_the_same_in_whatever_blocks_the_text_comes(blocks, kind):
    """The definitions, on the whole text."""
    text = "".join(blocks)
    if kind == "blank-line":
        expected = re.split(r"\n(?:[^\S\n]*\n)+", text.strip("\n"))
    else:
        expected = [text] if kind == "file" else text.split("\n" if kind == "line" else kind)
    assert splitted(blocks, kind) == [piece for piece in expected if piece and not piece.isspace()]
