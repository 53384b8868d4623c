"""The door to the fast core: what byte-level BPE asks of it, with the Python reference behind the same door.

The core is _core.c, compiled when Quire is installed where there is a C compiler. Without it everything works, by
merges.py and patterns.py, about twenty times slower. Both give the same tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from quire.devices import usable_cores
from quire.tokenizers import merges, pieces
from quire.tokenizers.patterns import character_classes, splitter

try:
    from quire.tokenizers import _core as fast  # type: ignore[attr-defined]
except ImportError:  # not compiled
    fast = None

IN_CORE = ("gpt2", "cl100k", "cl100k-hf", "qwen2", "smollm")  # what byte-level BPE may have, as _core.c numbers them
if getattr(fast, "PATTERNS", 0) != len(IN_CORE):  # compiled from an older source, it would split otherwise
    fast = None


def learn(
    texts: Iterable[bytes], pattern: str, count: int, threads: int = 0, room: int = pieces.ROOM
) -> list[tuple[int, int]]:
    """Up to `count` merges of the pieces of all texts, as pairs of ids: 0 to 255 are bytes, 256 + i is merge i.

    Of the pieces it keeps what has room (pieces.py), in the core as in Python.
    """
    if fast is None:
        counted = pieces.PieceCounts[bytes](room).add(texts, lambda text: _pieces(text, pattern))
        return merges.learn(counted.counts, count, lambda left, right, number: 256 + number)
    idle: list[Any] = []  # counters that are empty
    number, classes = IN_CORE.index(pattern), character_classes()

    def count_share(share: Iterable[bytes]) -> Any:
        counter = _taken(idle) or fast.counter()
        for text in share:
            fast.count(counter, text, classes, number, pieces.LONGEST)
        return counter

    total, shares, threads = fast.counter(), pieces.shares(texts), threads or usable_cores()
    with ThreadPoolExecutor(threads) as pool:
        while together := list(islice(shares, threads)):  # no more of the texts is in memory at once
            for counter in pool.map(count_share, together):
                fast.join(total, counter, room)
                idle.append(counter)
    pairs = np.frombuffer(fast.train(total, count, 2), dtype=np.int32).reshape(-1, 2)
    return [(left, right) for left, right in pairs.tolist()]


class Encoder:
    """Turns bytes into ids by a list of merges (left id, right id, id of both), the first one first.

    `tokens` are the bytes of each id, `whole` those for pieces that equal them, whatever the merges make of such a
    piece. What a merge makes must be the bytes of its two parts, one after the other. A byte that has no token becomes
    the id `nothing`, the first that is above them all.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        triples: Sequence[tuple[int, int, int]],
        whole: Mapping[bytes, int],
        pattern: str,
    ) -> None:
        self.tokens, self.triples, self.whole, self.pattern = tokens, triples, whole, pattern
        ids = {token: number for number, token in enumerate(tokens) if len(token) == 1}
        self.nothing = len(tokens)
        self.byte_ids = [ids.get(bytes([byte]), self.nothing) for byte in range(256)]
        self._ranks: dict[tuple[int, int], tuple[int, int]] = {}
        self._cache: dict[bytes, list[int]] = {}
        self._idle: list[Any] = []  # encoders of the core: one serves one thread at a time

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of `text`, int32."""
        if fast is None:
            found = [number for piece in _pieces(text, self.pattern) for number in self._encode_piece(piece)]
            return np.array(found, dtype=np.int32)
        encoder = _taken(self._idle) or self._make()
        ids = np.empty(len(text), dtype=np.int32)
        ids.resize(fast.encode(encoder, text, ids), refcheck=False)
        self._idle.append(encoder)  # not where memory ran out: such a one is not used again
        return ids

    def __getstate__(self) -> dict[str, Any]:  # to another process goes what it is made of
        return {**vars(self), "_ranks": {}, "_cache": {}, "_idle": []}

    def _encode_piece(self, piece: bytes) -> list[int]:
        if (known := self._cache.get(piece)) is not None:
            return known
        if not self._ranks:
            self._ranks = {(left, right): (rank, both) for rank, (left, right, both) in enumerate(self.triples)}
        if piece in self.whole:
            ids = [self.whole[piece]]
        else:
            ids = merges.apply([self.byte_ids[byte] for byte in piece], self._ranks)
        if len(self._cache) >= 1 << 16:
            self._cache.clear()
        if len(piece) <= merges.SHORT:
            self._cache[piece] = ids
        return ids

    def _make(self) -> Any:
        byte_ids = np.array(self.byte_ids, dtype=np.int32).tobytes()
        triples = np.array(self.triples, dtype=np.int32).tobytes()
        sizes = np.array([*(len(token) for token in self.tokens), 1], dtype=np.int32).tobytes()
        number = IN_CORE.index(self.pattern)
        return fast.encoder(byte_ids, triples, dict(self.whole), sizes, character_classes(), number)


def _taken(idle: list[Any]) -> Any:
    """One of the idle ones, or None; two threads never get the same."""
    try:
        return idle.pop()
    except IndexError:
        return None


def _pieces(text: bytes, pattern: str) -> Iterator[bytes]:
    """The pieces of a text; bytes that are not UTF-8 are characters of no class, one each."""
    for found in splitter(pattern).finditer(text.decode("utf-8", "surrogateescape")):
        yield found[0].encode("utf-8", "surrogateescape")
