"""Token shards: a token stream in files of a bounded size, with an index that says what each holds.

    index.json              format, tokenizer, content, dtype, a report, and of each shard its name, its tokens and
                            documents, checksums, and the span of the text it was made from
    training-00000.bin      tokens, little-endian, 2 bytes each where the vocabulary allows, else 4
    training-00000.starts   for each document that begins in the shard, the place of its separator there: int64
    validation-00000.bin    ... the same for the held-out text
    tokenizer.json

A stream needs no more than arrays: TokenStream([np.memmap("train.bin", "<u2", "r")]) reads tokens that others made.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quire import files
from quire.data.documents import BYTES, Documents, Place
from quire.errors import UserError

SHARD = 1 << 24  # bytes of text that go into one shard; it has at most as many tokens, and separators
SHORT = 1 << 20  # bytes of a document that is never cut in two
INDEX, FINISHED = "index.json", "finished.jsonl"  # FINISHED: the shards of an index that is not written yet
STREAMS = ("training", "validation")

FETCHED_AT_ONCE = 8  # blocks, where a shard lies elsewhere

Shard = dict[str, Any]


class Fetched(Protocol):
    """Tokens that are fetched when they are sliced: a part of a stream that is no array."""

    dtype: np.dtype[Any]

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice) -> np.ndarray: ...

    def span(self, start: int, stop: int) -> "Fetched":
        """The tokens from `start` to `stop`, of which nothing is fetched yet."""
        ...

    def missing(self, start: int, stop: int) -> dict[Hashable, Callable[[], object]]:
        """What fetches each block that these tokens lie in and that is not on this machine, by a name of the block."""
        ...


Part = np.ndarray | Fetched


def token_type(vocabulary_size: int) -> np.dtype[Any]:
    """How token ids are stored: little-endian, 2 bytes where they suffice."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


class TokenStream:
    """Tokens in several arrays, one after the other, read as one: `len`, and slices, which are arrays."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """`parts`: memory-mapped files, or arrays, or what lies elsewhere, of one type."""
        self.parts = [part for part in parts if len(part)]
        self.dtype = parts[0].dtype if parts else np.dtype("<u2")
        self._ends = np.cumsum([len(part) for part in self.parts]).tolist()
        self._here = all(isinstance(part, np.ndarray) for part in self.parts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: Any) -> Any:
        """One token, or the array of a slice."""
        if not isinstance(place, slice):
            start = range(len(self))[place]
            return self[start : start + 1][0]
        start, stop, step = place.indices(len(self))
        assert step == 1, "a stream is read forwards"
        found = [part[begin:end] for part, begin, end in self._pieces(start, stop)]
        if len(found) == 1:
            return np.asarray(found[0])
        return np.concatenate(found) if found else np.empty(0, dtype=self.dtype)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """The parts in which these tokens lie, and from where to where in each."""
        number = bisect_right(self._ends, start)
        while start < stop:
            part, begins = self.parts[number], self._ends[number] - len(self.parts[number])
            yield part, start - begins, min(stop - begins, len(part))
            start, number = self._ends[number], number + 1

    def fetch(self, places: Sequence[slice]) -> None:
        """Bring what these slices need onto this machine, several blocks at once. Of arrays nothing is to be brought.

        A slice alone does that too, one block after the other.
        """
        if self._here:
            return
        waiting: dict[Hashable, Callable[[], object]] = {}
        for place in places:
            for part, begin, end in self._pieces(place.start, place.stop):
                if not isinstance(part, np.ndarray):
                    waiting |= part.missing(begin, end)
        if waiting:
            with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
                for done in [pool.submit(fetch) for fetch in waiting.values()]:
                    done.result()

    def span(self, start: int, stop: int) -> "TokenStream":
        """The stream of the tokens from `start` to `stop`, of which nothing is read yet."""
        start, stop, _ = slice(start, stop).indices(len(self))
        cut: list[Part] = []
        for part, begin, end in self._pieces(start, stop):
            cut.append(part[begin:end] if isinstance(part, np.ndarray) else part.span(begin, end))
        return TokenStream(cut or [np.empty(0, dtype=self.dtype)])

    def __iter__(self) -> Iterator[Any]:
        for part, begin, end in self._pieces(0, len(self)):
            yield from part[begin:end]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All tokens in memory."""
        return np.array(self[:], dtype=dtype)


def plan(documents: Documents, size: int) -> list[tuple[Place, Place]]:
    """The spans of text that the shards are made from, each of about `size` bytes.

    They depend on the text alone. A document is cut only if it is long, at a `cut_place`.
    """
    places: list[Place] = [(0, 0)]
    done, target = 0, size  # bytes before these rows, and those before the next place
    for first, rows in documents.chunks():
        ends = done + np.cumsum(rows[:, BYTES])
        while target < ends[-1]:
            row = int(np.searchsorted(ends, target, side="right"))
            length = int(rows[row, BYTES])
            begins = int(ends[row]) - length
            document, byte, low = first + row, target - begins, 0
            if length > min(SHORT, size):
                low = places[-1][1] if places[-1][0] == document else 0
                low = documents.cut_before(document, byte, low)
            if (document, low) <= places[-1]:  # a document without a place to cut, or a span that is full already
                low = documents.whole_characters(document, byte)
            places.append((document, low))
            target = begins + low + size
        done = int(ends[-1])
    return list(zip(places, [*places[1:], (len(documents), 0)], strict=True))


def intact(folder: Path, shard: Shard) -> bool:
    """Whether a shard is there, and no bit of it has changed."""
    try:
        return all(files.crc32_of(folder / (shard["name"] + end)) == crc for end, crc in shard["crc32"].items())
    except OSError:
        return False


def finished(folder: Path) -> dict[str, Shard]:
    """The intact shards in a folder, by name, whether its index has been written or not."""
    try:
        index = files.read_json(folder / INDEX)
        known = [shard for stream in STREAMS for shard in index[stream]]
    except (OSError, UserError):
        known = _logged(folder)
    return {shard["name"]: shard for shard in known if intact(folder, shard)}


def _logged(folder: Path) -> list[Shard]:
    try:
        return files.read_lines(folder / FINISHED)
    except UserError:
        files.remove(folder / FINISHED)
        return []


def opened(folder: Path, shards: list[Shard], dtype: Any) -> TokenStream:
    """The stream of some shards, by memory map."""
    paths = [folder / f"{shard['name']}.bin" for shard in shards]
    return TokenStream([np.memmap(path, dtype, "r") for path in paths if path.stat().st_size])


def start_of(folder: Path, shards: list[Shard], document: int) -> int:
    """Where in the stream of `shards` the separator of a document is, or the stream's end for one past the last."""
    tokens = 0
    for shard in shards:
        if document < shard["documents"]:
            (place,) = np.fromfile(folder / f"{shard['name']}.starts", "<i8", 1, offset=8 * document)
            return tokens + int(place)
        tokens, document = tokens + shard["tokens"], document - shard["documents"]
    return tokens
