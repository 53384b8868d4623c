"""Byte-pair encoding as an algorithm on rows of symbols: learning merges, and applying them.

A symbol is whatever can be compared: a string, or the id of a token. B. Gage (1994) replaced the most frequent pair of
bytes by a byte not in use, again and again; Sennrich et al. (2016) did it to the words of a text, weighted by how
often each word occurs. What is learned is a list of pairs, and its order is all there is to know when it is applied:

learn    until enough: merge, everywhere, the pair of neighbours that occurs most often
apply    until none is left: merge the pair that was learned first, and of those the leftmost

The C core does both in the same way for bytes; it is faster, and gives the same.
"""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

Symbol = Any  # hashable, and comparable with its like
Pair = tuple[Symbol, Symbol]
Ranks = Mapping[Pair, tuple[int, Symbol]]  # a pair to its place in the list of merges, and what it becomes

Ties = Literal["smallest", "largest", "first"]  # which of the pairs that occur equally often is merged

SHORT = 48  # symbols up to which looking again and again for the lowest rank is quicker than keeping lists
WINDOW = 4096  # symbols of a long row that are at work at once


def learn(
    words: Mapping[Any, int],
    merges: int,
    join: Callable[[Symbol, Symbol, int], Symbol],
    ties: Ties = "smallest",
    fewest: int = 2,
) -> list[Pair]:
    """Up to `merges` pairs in the order in which they are merged, from words (rows of symbols) and their counts.

    `join(left, right, number)` is the symbol that merge `number` makes. Of the pairs that occur most often it is the
    smallest, the largest, or the one that stands first in the words; none that occurs less than `fewest` times.
    """
    row = _Row(words)
    queue = [_Candidate(count, pair, ties) for pair, count in row.counts.items()]
    heapq.heapify(queue)
    learned: list[Pair] = []
    while queue and len(learned) < merges:
        best = heapq.heappop(queue)
        if best.count != row.counts[best.pair]:  # it has changed since it was put here: a newer entry stands for it
            continue
        if best.count < fewest:
            break
        if ties == "first":
            best = _standing_first(best, queue, row)
        joined = join(*best.pair, len(learned))
        learned.append(best.pair)
        for pair in row.merge(best.pair, joined):
            if row.counts[pair] > 0:
                heapq.heappush(queue, _Candidate(row.counts[pair], pair, ties))
            else:
                del row.counts[pair]
    return learned


def merged(row: Sequence[Symbol], pair: Pair, joined: Symbol) -> list[Symbol]:
    """The row with `joined` wherever the pair stood, from left to right: a a a becomes aa a."""
    result, i = [], 0
    while i < len(row):
        if i + 1 < len(row) and (row[i], row[i + 1]) == pair:
            result.append(joined)
            i += 2
        else:
            result.append(row[i])
            i += 1
    return result


def apply(row: Sequence[Symbol], ranks: Ranks) -> list[Symbol]:
    """The row after all merges that can be made, the lowest rank first and of equal ones the leftmost."""
    if len(row) > SHORT:
        return _apply_long(row, ranks)
    row = list(row)
    while len(row) > 1:
        known = [(ranks[pair][0], i) for i, pair in enumerate(pairwise(row)) if pair in ranks]
        if not known:
            break
        _, i = min(known)
        row[i : i + 2] = [ranks[row[i], row[i + 1]][1]]
    return row


def _apply_long(row: Sequence[Symbol], ranks: Ranks) -> list[Symbol]:
    """The same in a time that grows as the row does: window by window, so that what is at work stays small.

    Where symbols a and b are what the row of both becomes, no merge ever reaches across their border: before the first
    one that did, both sides would change as they do alone, so that it would come up in the row of both, too. Windows
    that meet in such a border give what the whole row becomes; where they do not, larger ones are tried.
    """
    window = WINDOW
    while (found := _in_windows(row, ranks, window)) is None:
        window *= 2
    return found


def _in_windows(row: Sequence[Symbol], ranks: Ranks, window: int) -> list[Symbol] | None:
    made: list[tuple[Symbol, int]] = []  # symbols, and how many of the row's each of them is
    start = 0
    while start < len(row):
        found = _apply_window(row[start : start + window], ranks)
        if start + window < len(row):  # the last symbols would often change with what follows
            ends = accumulate(width for _, width in found)
            found = [each for each, end in zip(found, ends) if end <= window - window // 8]
        if not found:
            return None
        if made:
            (left, before), (right, after) = made[-1], found[0]
            both = _apply_window(row[start - before : start + after], ranks)
            if [symbol for symbol, _ in both] != [left, right]:
                return None
        made += found
        start += sum(width for _, width in found)
    return [symbol for symbol, _ in made]


def _apply_window(row: Sequence[Symbol], ranks: Ranks) -> list[tuple[Symbol, int]]:
    """What the row becomes, each symbol with the number of symbols that went into it.

    Places wait in a list for each rank, and a heap holds the ranks.
    """
    symbols: list[Symbol | None] = list(row)
    before, after = list(range(-1, len(row) - 1)), list(range(1, len(row) + 1))  # neighbours that are still there
    waiting: defaultdict[int, list[int]] = defaultdict(list)
    heap: list[int] = []

    def rank_at(place: int) -> int | None:
        if place < 0 or after[place] >= len(symbols) or symbols[place] is None:
            return None
        found = ranks.get((symbols[place], symbols[after[place]]))
        return None if found is None else found[0]

    def wait(place: int) -> int | None:
        if (rank := rank_at(place)) is not None:
            if not waiting[rank]:
                heapq.heappush(heap, rank)
            waiting[rank].append(place)
        return rank

    for place in range(len(row)):
        wait(place)
    while heap:
        rank = heapq.heappop(heap)
        places = sorted(waiting.pop(rank, []))
        for number, place in enumerate(places):
            if rank_at(place) != rank:  # one of the two was merged meanwhile
                continue
            second = after[place]
            symbols[place], symbols[second] = ranks[symbols[place], symbols[second]][1], None
            after[place] = after[second]
            if after[place] < len(symbols):
                before[after[place]] = place
            new = [wait(before[place]), wait(place)]
            if any(other is not None and other <= rank for other in new):  # no merges that were learned here do this
                for left in places[number + 1 :]:
                    wait(left)
                break
    return [(symbol, after[place] - place) for place, symbol in enumerate(symbols) if symbol is not None]


class _Candidate:
    """A pair in the queue: the most frequent first, ties as the rule says."""

    __slots__ = ("count", "pair", "ties")

    def __init__(self, count: int, pair: Pair, ties: Ties) -> None:
        self.count, self.pair, self.ties = count, pair, ties

    def __lt__(self, other: "_Candidate") -> bool:
        if self.count != other.count:
            return self.count > other.count
        return self.pair > other.pair if self.ties == "largest" else self.pair < other.pair


class _Row:
    """All words in one row, and for each pair how often it occurs and where: a merge touches its own places only."""

    def __init__(self, words: Mapping[Any, int]) -> None:
        self.symbols: list[Symbol | None] = [None]  # None: between words, and what was merged into the symbol before
        self.weights = [0]  # of each place: how often its word occurs
        for word, count in words.items():
            self.symbols += [*word, None]
            self.weights += [count] * (len(word) + 1)
        self.before, self.after = list(range(-1, len(self.symbols) - 1)), list(range(1, len(self.symbols) + 1))
        self.counts: Counter[Pair] = Counter()
        self.places: defaultdict[Pair, deque[int]] = defaultdict(deque)  # in order; some may be gone
        for place in range(len(self.symbols) - 1):
            self.gain(place)

    def pair_at(self, place: int) -> Pair | None:
        """The symbol at a place with the next one, if both are there."""
        if self.symbols[place] is None or self.symbols[self.after[place]] is None:
            return None
        return self.symbols[place], self.symbols[self.after[place]]

    def gain(self, place: int) -> Pair | None:
        """Count the pair that begins at a place."""
        if (pair := self.pair_at(place)) is not None:
            self.counts[pair] += self.weights[place]
            self.places[pair].append(place)
        return pair

    def lose(self, place: int) -> Pair | None:
        """Count it no longer."""
        if (pair := self.pair_at(place)) is not None:
            self.counts[pair] -= self.weights[place]
        return pair

    def first(self, pair: Pair) -> int:
        """The first place where a pair stands."""
        places = self.places[pair]
        while self.pair_at(places[0]) != pair:
            places.popleft()
        return places[0]

    def merge(self, pair: Pair, joined: Symbol) -> set[Pair]:
        """Put `joined` in the place of the pair, from the first to the last; gives the pairs whose counts changed."""
        changed: set[Pair | None] = set()
        for place in self.places.pop(pair):
            if self.pair_at(place) != pair:
                continue
            previous, second = self.before[place], self.after[place]
            changed |= {self.lose(previous), self.lose(place), self.lose(second)}
            self.symbols[place], self.symbols[second] = joined, None
            self.after[place] = self.after[second]
            self.before[self.after[place]] = place
            changed |= {self.gain(previous), self.gain(place)}
        return {pair for pair in changed if pair is not None}


def _standing_first(best: _Candidate, queue: list[_Candidate], row: _Row) -> _Candidate:
    """Of the pairs that occur as often as `best`, the one that stands first; the others stay in the queue."""
    equal = [best]
    while queue and queue[0].count == best.count:
        other = heapq.heappop(queue)
        if row.counts[other.pair] == other.count:
            equal.append(other)
    equal.sort(key=lambda candidate: row.first(candidate.pair))
    for other in equal[1:]:
        heapq.heappush(queue, other)
    return equal[0]
