"""Counting the pieces of any amount of text in memory that is bounded.

The texts are counted in shares of about SHARE bytes, each for itself, and the counts are added up in the order of the
shares. Whenever the sum takes more than its room, only the most frequent pieces stay, of equally frequent ones those
that were met first: as many as half of the room holds. A piece takes its length and 8 more. Pieces longer than LONGEST
are counted as parts of that length. So what stays is decided by the texts as they come, never by how many threads
count, and as long as there is room nothing is left out.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import AnyStr, Generic

SHARE = 1 << 20
LONGEST = 1 << 16
ROOM = 10_000_000  # fitting byte-level BPE takes at most about 30 bytes for each
ROOM_IN_PYTHON = 2_000_000  # of word and bpe, whose pieces and pairs are objects
PIECE = 8


class PieceCounts(Generic[AnyStr]):
    """How often each piece occurs, as far as there is room; `counts` begins with those met first."""

    def __init__(self, room: int = 0) -> None:
        self.room = room or ROOM_IN_PYTHON
        self.counts: Counter[AnyStr] = Counter()

    def add(self, texts: Iterable[AnyStr], split: Callable[[AnyStr], Iterable[AnyStr]]) -> "PieceCounts[AnyStr]":
        """Count the pieces into which `split` cuts the texts."""
        for share in shares(texts):
            counts: Counter[AnyStr] = Counter()
            for text in share:
                counts.update(split(text))
            self.counts.update(_cut(counts) if any(len(piece) > LONGEST for piece in counts) else counts)
            self._prune()
        return self

    def _prune(self) -> None:
        if sum(map(len, self.counts)) + PIECE * len(self.counts) <= self.room:
            return
        kept: Counter[AnyStr] = Counter()
        size = 0
        for piece, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            size += len(piece) + PIECE
            if size > self.room // 2:
                break
            kept[piece] = count
        self.counts = kept


def shares(texts: Iterable[AnyStr]) -> Iterator[list[AnyStr]]:
    """The texts in lists of about SHARE bytes or characters, the last one shorter."""
    share: list[AnyStr] = []
    size = 0
    for text in texts:
        share.append(text)
        size += len(text)
        if size >= SHARE:
            yield share
            share, size = [], 0
    if share:
        yield share


def _cut(counts: Counter[AnyStr]) -> Counter[AnyStr]:
    """The same with long pieces as parts."""
    parts: Counter[AnyStr] = Counter()
    for piece, count in counts.items():
        for at in range(0, len(piece), LONGEST):
            parts[piece[at : at + LONGEST]] += count
    return parts
