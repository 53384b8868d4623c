"""Texts made from Wikipedia: enwik8, text8 and the articles of WikiText."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import IO

from quire.errors import UserError
from quire.sources.archives import gunzipped

ENWIK8_SIZE = 100_000_000
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"  # published at mattmahoney.net/dc/textdata.html


def enwik8(packed: IO[bytes]) -> Iterator[bytes]:
    """The unpacked enwik8, whole, checked against its published checksum."""
    data = b"".join(gunzipped(packed, ENWIK8_SIZE))
    if (len(data), hashlib.md5(data, usedforsecurity=False).hexdigest()) != (ENWIK8_SIZE, ENWIK8_MD5):
        raise UserError("The archive is refused: the enwik8 inside it is not the published one, by its MD5.")
    yield data


def text8(packed: IO[bytes]) -> Iterator[bytes]:
    """`plain_words` of the packed enwik8, as one text."""
    yield b"".join(plain_words(gunzipped(packed, ENWIK8_SIZE)))


# ---- Wikipedia's XML to plain words -------------------------------------------------------------------------------

# What happens to an article, in this order: what a reader of the page would not see goes, what he would see stays.
# The rules are those of the filter that made text8 (Matt Mahoney 2006, mattmahoney.net/dc/textdata.html, appendix A).
_RULES = [
    (rb"&amp;", b"&"),
    (rb"&lt;", b"<"),
    (rb"&gt;", b">"),
    (rb"<ref[^<]*</ref>", b""),  # footnotes
    (rb"<[^>]*>", b""),  # tags of HTML
    (rb"\[http:[^\] ]*", b"["),  # [http://... caption]: the address
    (rb"(?i)\|thumb", b""),  # of [[Image:name|thumb|250px|caption]] only the caption stays
    (rb"(?i)\|left", b""),
    (rb"(?i)\|right", b""),
    (rb"(?i)\|[0-9]+px", b""),
    (rb"(?i)\[\[image:[^\[\]]*\|", b""),
    (rb"(?i)\[\[category:([^|\]]*)[^\]]*\]\]", rb"[[\1]]"),
    (rb"\[\[[a-z-]*:[^\]]*\]\]", b""),  # [[de:...]]: the article in other languages
    (rb"\[\[[^|\]]*\|", b"[["),  # [[target|caption]]: the target
    (rb"\{\{[^}]*\}\}", b""),  # templates
    (rb"\{[^}]*\}", b""),  # tables
    (rb"[\[\]]", b""),
    (rb"&[^;]*;", b" "),  # &nbsp; and its like
]
_REPLACEMENTS = [(re.compile(pattern), replacement) for pattern, replacement in _RULES]
_DIGITS = [
    (str(digit).encode(), b" " + word + b" ")
    for digit, word in enumerate(b"zero one two three four five six seven eight nine".split())
]
_TAG = re.compile(rb"<[^\n]*>")
_REDIRECT = re.compile(rb"(?i)#redirect")
_NO_LETTERS = re.compile(rb"[^a-z]+")


def plain_words(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The articles of a Wikipedia dump in XML as words of the letters a to z, with a space before each.

    Links and images leave their captions, digits are spelled out (7: seven), and all else becomes a space.
    """
    inside = False
    for record in _records(pieces):
        inside = inside or b"<text " in record
        if inside and _REDIRECT.search(record):
            inside = False
        if inside:
            inside = b"</text>" not in record
            words = _words(_TAG.sub(b"", record, count=1))
            if words:
                yield words


def _words(text: bytes) -> bytes:
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    text = text.lower()
    for digit, word in _DIGITS:
        text = text.replace(digit, word)
    return _NO_LETTERS.sub(b" ", b" " + text + b" ")[:-1]


def _records(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The stream cut behind each `>`: in XML only tags have one, so an article's whole text is one record."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b">")
        for record in whole:
            yield record + b">"
    if rest:
        yield rest


# ---- WikiText -----------------------------------------------------------------------------------------------------


def articles(lines: IO[bytes]) -> Iterator[bytes]:
    """The articles of a WikiText file, each from its heading (` = Title = `, alone between blank lines) on."""
    article: list[bytes] = []
    previous, heading = b"\n", False  # whether `previous` looks like a heading, as far as one can tell without the next
    for line in lines:
        if heading and line.isspace():
            yield from _joined(article[:-1])
            article = article[-1:]
        heading = previous.isspace() and _HEADING.fullmatch(line) is not None
        previous = line
        article.append(line)
    yield from _joined(article)


_HEADING = re.compile(rb" = [^=\s](?:.*[^=\s])? = \n?")


def _joined(lines: list[bytes]) -> Iterator[bytes]:
    text = b"".join(lines)
    if text and not text.isspace():
        yield text
