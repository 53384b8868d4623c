"""Documents on disk: one UTF-8 file with all their text, and an index of where each lies.

Text and index are read in parts, so that a corpus of any size takes little memory.
"""

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quire import files
from quire.tokenizers.tokenizer import LONGEST_STRETCH, cut_place

BLOCK = 1 << 20  # bytes of text read at once
ROWS = 1 << 14  # documents whose places are read at once
ROW = np.dtype("<i8")
START, BYTES, CHARACTERS = range(3)  # columns of the index

Place = tuple[int, int]  # a document, and a byte in it
Mark = tuple[int, str]  # bytes and sha256 of a document


@dataclass(frozen=True)
class Documents:
    """The documents `first` to `last` of an index, whose rows are (start in the text file, bytes, characters).

    `group` documents one after the other stay together: 2 where they are a source and its target by turns.
    """

    text: Path
    index: Path
    first: int
    last: int
    owner: Any = field(default=None, repr=False, compare=False)  # whoever deletes the files when nobody needs them
    group: int = 1

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[str]:
        """Each document as one string."""
        parts: list[str] = []
        for begins, text in self.pieces():
            if begins and parts:
                yield "".join(parts)
                parts = []
            parts.append(text)
        if parts:
            yield "".join(parts)

    def __getitem__(self, chosen: slice) -> "Documents":
        """Some of the documents, one after the other."""
        first, last, _ = chosen.indices(len(self))
        return replace(self, first=self.first + first, last=self.first + max(first, last))

    def rows(self, first: int, last: int) -> np.ndarray:
        """The rows (start, bytes, characters) of some documents, counted from the first of these: int64, (n, 3)."""
        count, offset = 3 * (last - first), 3 * ROW.itemsize * (self.first + first)
        return np.fromfile(self.index, ROW, count, offset=offset).reshape(-1, 3)

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All rows, some thousand at once, each time with the number of the first."""
        for first in range(0, len(self), ROWS):
            yield first, self.rows(first, min(first + ROWS, len(self)))

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes, characters, and the characters of the longest document."""
        totals, longest = np.zeros(3, dtype=np.int64), 0
        for _, rows in self.chunks():
            totals += rows.sum(0)
            longest = max(longest, int(rows[:, CHARACTERS].max()))
        return int(totals[BYTES]), int(totals[CHARACTERS]), longest

    def pieces(self, begin: Place = (0, 0), end: Place | None = None) -> Iterator[tuple[bool, str]]:
        """The text from one place to another, in strings that end at a `cut_place`, of about a megabyte.

        With each goes whether a document begins there. Encoded one by one, they give the ids of whole documents. Where
        there is no such place for long (a text without spaces and single line ends), a string is as long as that
        stretch, up to LONGEST_STRETCH characters; there it is cut all the same.
        """
        last, stop = end or (len(self), 0)
        place = 0
        with open(self.text, "rb") as file:
            for first in range(begin[0], last + (stop > 0), ROWS):
                rows = self.rows(first, min(first + ROWS, last + (stop > 0)))
                for number, (start, size, _) in enumerate(rows.tolist(), first):
                    skip = begin[1] if number == begin[0] else 0
                    size = stop if number == last else size
                    if place != start + skip:
                        file.seek(start + skip)
                    place = start + size
                    if size - skip <= BLOCK:
                        yield skip == 0, file.read(size - skip).decode()
                    else:
                        for index, text in enumerate(_blocks(file, size - skip)):
                            yield skip == 0 and index == 0, text

    def texts(self) -> Iterator[str]:
        """All the text, in strings that end at a `cut_place` or with a document."""
        return (text for _, text in self.pieces())

    def cut_before(self, document: int, byte: int, low: int) -> int:
        """The last byte of a document, above `low` and at most `byte`, where its text can be cut in two; or `low`."""
        start = int(self.rows(document, document + 1)[0, START])
        window = min(1 << 12, byte - low)
        with open(self.text, "rb") as file:
            while window:
                file.seek(start + byte - window)
                data = file.read(window)
                text = data.decode(errors="ignore")  # half a character at either end
                if 0 < (place := cut_place(text)) < LONGEST_STRETCH:
                    return byte - window + _halves(data) + len(text[:place].encode())
                if window == byte - low:
                    break
                window = min(16 * window, byte - low)
        return low

    def whole_characters(self, document: int, byte: int) -> int:
        """The last byte of a document, at most `byte`, where a character begins."""
        start = int(self.rows(document, document + 1)[0, START])
        with open(self.text, "rb") as file:
            file.seek(start + byte - 3)
            return byte - 3 + max(i for i, value in enumerate(file.read(4)) if value & 0xC0 != 0x80)

    def marks(self) -> set[Mark]:
        """By what each document is known again, whatever text it stands in; a group is known by its first."""
        with open(self.text, "rb") as text:
            leaders = (row for _, rows in self.chunks() for row in rows[:: self.group].tolist())
            return {(row[BYTES], _sha256(text, row)) for row in leaders}

    def without(self, apart: set[Mark], index: Path) -> tuple["Documents", np.ndarray, set[Mark]]:
        """These documents without the groups marked so, by an index written to `index`; numbers, marks of those gone.

        Only documents of equal sizes are read and compared.
        """
        sizes = {size for size, _ in apart}
        found: list[int] = []
        marks: set[Mark] = set()
        with open(self.text, "rb") as text, files.open_new(index) as file:
            for first, rows in self.chunks():
                gone = []
                for row in rows[:: self.group].tolist():
                    mark = (row[BYTES], _sha256(text, row)) if row[BYTES] in sizes else (0, "")
                    gone += [mark in apart] * self.group
                    marks |= {mark} & apart
                found += (first + np.flatnonzero(gone)).tolist()
                file.write(rows[~np.array(gone)].tobytes())
        left = replace(self, index=index, first=0, last=len(self) - len(found))
        return left, np.array(found, dtype=np.int64), marks

    def characters_at_the_end(self, row: Any, count: int) -> int:
        """How many bytes the last `count` characters of a document have."""
        size = min(row[BYTES], 4 * count)
        with open(self.text, "rb") as file:
            file.seek(row[START] + row[BYTES] - size)
            text = file.read(size).decode(errors="ignore")
        return len(text[len(text) - count :].encode())

    def listed(self, index: Path, rows: Iterable[np.ndarray]) -> "Documents":
        """Other parts of the same text, by rows that are written to `index`."""
        with files.open_new(index) as file:
            for part in rows:
                file.write(np.ascontiguousarray(part, dtype=ROW).tobytes())
        return replace(self, index=index, first=0, last=os.path.getsize(index) // (3 * ROW.itemsize))


def _halves(data: bytes) -> int:
    """Bytes at the beginning that belong to a character before."""
    return next((i for i, value in enumerate(data) if value & 0xC0 != 0x80), len(data))


def _sha256(file: Any, row: list[int]) -> str:
    """The digest of the document in a row of the index."""
    digest, left = hashlib.sha256(), row[BYTES]
    file.seek(row[START])
    while left and (block := file.read(min(left, BLOCK))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _blocks(file: Any, size: int) -> Iterator[str]:
    """The next `size` bytes of a text file, in strings that end at a `cut_place`."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held: list[str] = []  # text without a place to cut, or after the last one
    length = 0
    while size:
        data = file.read(min(BLOCK, size))
        assert data, "the text file is shorter than its index says"
        size -= len(data)
        context = held[-1][-2:] if held else ""  # what a place to cut is told by, beside the new text
        text = context + decoder.decode(data, not size)
        held.append(text[len(context) :])
        length += len(held[-1])
        place = cut_place(text) if size else 0
        if 0 < place < len(text):
            whole = "".join(held)
            cut = len(whole) - len(text) + place
            yield whole[:cut]
            held, length = [whole[cut:]], len(whole) - cut
        elif size and length > LONGEST_STRETCH:
            whole = "".join(held)
            yield whole[:LONGEST_STRETCH]
            held, length = [whole[LONGEST_STRETCH:]], length - LONGEST_STRETCH
    if whole := "".join(held):
        yield whole
