"""Byte-pair encoding as an algorithm on rows of symbols: learning merges, and applying them.

A symbol is whatever can be compared: a string, or the id of a token. B. Gage (1994) replaced the most frequent pair of
bytes by a byte not in use, again and again; Sennrich et al. (2016) did it to the words of a text, weighted by how
often each word occurs. What is learned is a list of pairs, and its order is all there is to know when it is applied:

learn    until enough: merge, everywhere, the pair of neighbours that occurs most often
apply    until none is left: merge the pair that was learned first, and of those the leftmost

The C core does both in the same way for bytes; it is faster, and gives the same.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

Symbol = Any  # hashable, and comparable with its like
Pair = tuple[Symbol, Symbol]
Ranks = Mapping[Pair, tuple[int, Symbol]]  # a pair to its place in the list of merges, and what it becomes

Ties = Literal["smallest", "largest", "first"]  # which of the pairs that occur equally often is merged

SHORT = 48  # symbols up to which looking again and again for the lowest rank is quicker than keeping lists


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
    rows = [list(word) for word in words]
    weights = list(words.values())
    counts: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)  # rows that may hold the pair
    for number, row in enumerate(rows):
        for pair in pairwise(row):
            counts[pair] += weights[number]
            where[pair].add(number)
    queue = [_Candidate(count, pair, ties) for pair, count in counts.items()]
    heapq.heapify(queue)
    learned: list[Pair] = []
    while queue and len(learned) < merges:
        best = heapq.heappop(queue)
        if best.count != counts[best.pair]:  # it has changed since it was put here: a newer entry stands for it
            continue
        if best.count < fewest:
            break
        if ties == "first":
            best = _standing_first(best, queue, counts, where, rows)
        joined = join(*best.pair, len(learned))
        learned.append(best.pair)
        changes: Counter[Pair] = Counter()
        for number in where.pop(best.pair):
            rows[number], lost, gained = _merged_with_changes(rows[number], best.pair, joined)
            for pair in lost:
                changes[pair] -= weights[number]
            for pair in gained:
                changes[pair] += weights[number]
                where[pair].add(number)
        for pair, change in changes.items():
            if not change:  # it stands as often as before, and so does its place in the queue
                continue
            counts[pair] += change
            if counts[pair] > 0:
                heapq.heappush(queue, _Candidate(counts[pair], pair, ties))
            else:
                del counts[pair]
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


def _merged_with_changes(row: list[Symbol], pair: Pair, joined: Symbol) -> tuple[list[Symbol], list[Pair], list[Pair]]:
    """The same, with the pairs of neighbours that are gone and those that are new, as often as they are."""
    left, right = pair
    result: list[Symbol] = []
    lost: list[Pair] = []
    gained: list[Pair] = []
    done = 0  # symbols of the row that are in the result
    for i in [i for i, both in enumerate(pairwise(row)) if both == pair]:
        if i < done:  # a a a: the middle one is merged already
            continue
        result += row[done:i]
        if result:  # its last symbol may be one that was joined a moment ago: what that gained is lost again
            lost.append((result[-1], left))
            gained.append((result[-1], joined))
        lost.append(pair)
        if i + 2 < len(row):
            lost.append((right, row[i + 2]))
            gained.append((joined, row[i + 2]))
        result.append(joined)
        done = i + 2
    return result + row[done:], lost, gained


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
    """The same in a time that grows as the row does: places wait in a list for each rank, a heap holds the ranks."""
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
            if any(other is not None and other < rank for other in new):  # no vocabulary that was learned has this
                for left in places[number + 1 :]:
                    wait(left)
                break
    return [symbol for symbol in symbols if symbol is not None]


class _Candidate:
    """A pair in the queue: the most frequent first, ties as the rule says."""

    __slots__ = ("count", "pair", "ties")

    def __init__(self, count: int, pair: Pair, ties: Ties) -> None:
        self.count, self.pair, self.ties = count, pair, ties

    def __lt__(self, other: "_Candidate") -> bool:
        if self.count != other.count:
            return self.count > other.count
        return self.pair > other.pair if self.ties == "largest" else self.pair < other.pair


def _standing_first(
    best: _Candidate,
    queue: list[_Candidate],
    counts: Counter[Pair],
    where: defaultdict[Pair, set[int]],
    rows: list[list[Symbol]],
) -> _Candidate:
    """Of the pairs that occur as often as `best`, the one that stands first; the others stay in the queue."""
    equal = [best]
    while queue and queue[0].count == best.count:
        other = heapq.heappop(queue)
        if counts[other.pair] == other.count:
            equal.append(other)

    def place(candidate: _Candidate) -> tuple[int, int]:
        pair = candidate.pair
        for number in sorted(where[pair]):
            pairs = list(pairwise(rows[number]))
            if pair in pairs:
                return number, pairs.index(pair)
        raise AssertionError("a pair that is counted stands somewhere")

    equal.sort(key=place)
    for other in equal[1:]:
        heapq.heappush(queue, other)
    return equal[0]
