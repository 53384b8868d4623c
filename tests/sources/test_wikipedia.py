"""Wikipedia's XML to plain words, and WikiText to articles."""

import gzip
import io
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import UserError
from quire.sources.wikipedia import articles, enwik8, plain_words, text8

SHARED = Path(__file__).parents[3] / "shared" / "data"

# One rule a row: what stands in an article, and the words it leaves.
RULES = [
    ("Plain Words, café.", " plain words caf"),
    ("In 1907", " in one nine zero seven"),
    ("a&amp;nbsp;b &amp;quot;c&amp;quot;", " a b c"),
    ("a &lt;b&gt;bold&lt;/b&gt; word&lt;br /&gt;", " a bold word"),
    ("said&lt;ref&gt;Smith, p. 3&lt;/ref&gt; so", " said so"),
    ("[http://example.org/a?b=1 the page] and [http://example.org]", " the page and"),
    ("[[owl]]s and [[Night bird|birds]]", " owls and birds"),
    ("[[Image:Owl.jpg|thumb|left|250px|An owl at night]]", " an owl at night"),
    ("[[Category:Birds|owl]]", " birds"),
    ("[[de:Eule]] [[simple:Owl]]end", " end"),
    ("{{birds}} {| a table\n|-\n| of two lines |} after", " after"),
]


def page(text: str) -> str:
    return f'<page>\n<title>Title 1</title>\n<text xml:space="preserve">{text}</text>\n<id>12</id>\n</page>\n'


@pytest.mark.parametrize(("text", "words"), RULES)
def test_each_rule(text, words):
    assert b"".join(plain_words([page(text).encode()])).decode() == words


def test_redirects_and_what_is_outside_of_articles_are_left_out():
    pages = [page("#REDIRECT [[Owl]]"), page("One"), page("#redirect [[Bird]]"), page(""), page("two")]
    assert b"".join(plain_words(["".join(pages).encode()])) == b" one two"


@given(st.lists(st.sampled_from(RULES), max_size=5), st.lists(st.integers(0, 900)))
def test_however_the_stream_is_cut(rules, places):
    data = "".join(page(text) for text, _ in rules).encode()
    cuts = [0, *sorted(place for place in places if place < len(data)), len(data)]
    pieces = [data[start:end] for start, end in pairwise(cuts)]
    assert b"".join(plain_words(pieces)).decode() == "".join(words for _, words in rules)


def test_a_file_that_is_not_enwik8():
    with pytest.raises(UserError, match="not the published one"):
        list(enwik8(io.BytesIO(gzip.compress(b"short"))))
    assert list(text8(io.BytesIO(gzip.compress(page("Short").encode())))) == [b" short"]


def test_articles_begin_with_their_headings():
    text = (
        b" \n = One = \n \n First . \n \n = = Section = = \n \n x = y = \n = no = \n more \n \n = Two = 2 = \n \n End"
    )
    one, two = articles(io.BytesIO(text))
    assert one == text[2 : text.index(b" = Two")] and two == b" = Two = 2 = \n \n End"
    assert list(articles(io.BytesIO(b" \n \n"))) == []
    assert list(articles(io.BytesIO(b"no heading\n"))) == [b"no heading\n"]


@pytest.mark.parametrize("part", ["valid", "test"])
def test_the_articles_of_wikitext(part):
    """The paper (Merity et al. 2016, table 1) counts 60 in each of these."""
    path = SHARED / f"wikitext2_{part}.txt"
    if not path.exists():
        pytest.skip("../shared/data is absent")
    with open(path, "rb") as file:
        found = list(articles(file))
    assert len(found) == 60
    assert b"".join(found).strip() == path.read_bytes().strip()
