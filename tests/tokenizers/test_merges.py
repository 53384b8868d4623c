"""Learning and applying merges, against the definitions written out."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.tokenizers import merges

quick = settings(max_examples=50, deadline=None)


def joined_everywhere(row, pair, joined):
    row, i = list(row), 0
    while i < len(row) - 1:
        if (row[i], row[i + 1]) == pair:
            row[i : i + 2] = [joined]
        i += 1
    return row


def learned_naively(words, number, join, ties, fewest):
    """The definition: count every pair of every word again at each step."""
    rows, learned = [list(word) for word in words], []
    while len(learned) < number:
        counts = Counter()
        for row, weight in zip(rows, words.values(), strict=True):
            for pair in pairwise(row):
                counts[pair] += weight  # a Counter keeps the order in which pairs were first met
        most = max(counts.values(), default=0)
        if most < fewest:
            break
        equal = [pair for pair, count in counts.items() if count == most]
        best = {"first": equal[0], "smallest": min(equal), "largest": max(equal)}[ties]
        rows = [joined_everywhere(row, best, join(*best, len(learned))) for row in rows]
        learned.append(best)
    return learned


def applied_naively(row, ranks):
    """The definition: the lowest rank, of equal ones the leftmost, until there is none."""
    row = list(row)
    while places := [(ranks[pair][0], i) for i, pair in enumerate(pairwise(row)) if pair in ranks]:
        i = min(places)[1]
        row[i : i + 2] = [ranks[row[i], row[i + 1]][1]]
    return row


def text(left, right, _):
    return left + right


def number(_, __, number):
    return 1000 + number


words = st.dictionaries(
    st.text("abc", min_size=1, max_size=9) | st.text("a", min_size=1, max_size=12), st.integers(1, 4), max_size=7
)


@pytest.mark.parametrize("ties", ["smallest", "largest", "first"])
@pytest.mark.parametrize("fewest", [1, 2, 3])
@quick
@given(words, st.integers(0, 12))
def test_learning_is_the_definition(ties, fewest, words, wanted):
    expected = learned_naively(words, wanted, text, ties, fewest)
    assert merges.learn(words, wanted, text, ties, fewest) == expected
    rows = {tuple(map(ord, word)): count for word, count in words.items()}
    assert merges.learn(rows, wanted, number, ties, fewest) == learned_naively(rows, wanted, number, ties, fewest)


@pytest.mark.parametrize("ties", ["smallest", "largest", "first"])
def test_learning_on_larger_vocabularies_is_the_definition(ties):
    rng = random.Random(3)
    for _ in range(6):
        rows = {"".join(rng.choices("abcdefgh", k=rng.randrange(1, 20))): rng.randrange(1, 6) for _ in range(60)}
        assert merges.learn(rows, 60, text, ties) == learned_naively(rows, 60, text, ties, 2)


def test_nothing_is_learned_of_nothing():
    assert merges.learn({}, 5, text) == []
    assert merges.learn({"": 3, "a": 9}, 5, text) == []
    assert merges.learn({"ab": 5}, 0, text) == []


@quick
@given(st.text("ab", max_size=120), words)
def test_learned_merges_applied_to_short_and_long_rows(row, words):
    learned = merges.learn(words, 12, text)
    ranks = {pair: (rank, "".join(pair)) for rank, pair in reversed(list(enumerate(learned)))}
    expected = applied_naively(row, ranks)
    assert merges.apply(row, ranks) == expected
    assert_long(row, ranks, expected)
    assert "".join(expected) == row


def assert_long(row, ranks, expected):
    """The long path, in windows that meet where no merge can reach across, or have to be larger."""
    for window in (4, 9, merges.WINDOW):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merges, "WINDOW", window)
            assert merges._apply_long(row, ranks) == expected


@quick
@given(st.text("ab", max_size=120), st.permutations("ab"), st.randoms(use_true_random=False))
def test_ranks_that_no_training_has_made(row, letters, rng):
    """A pair may outrank the merges that make its parts, and two pairs may make the same symbol."""
    symbols, ranks = list(letters), {}
    for _ in range(10):
        left, right = rng.choice(symbols), rng.choice(symbols)
        ranks.setdefault((left, right), (0, left + right))
        symbols.append(left + right)
    order = list(ranks)
    rng.shuffle(order)
    ranks = {pair: (rank, "".join(pair)) for rank, pair in enumerate(order)}
    expected = applied_naively(row, ranks)
    assert merges.apply(row, ranks) == expected
    assert_long(row, ranks, expected)


class Counting(dict):
    """Ranks that count how often they are asked."""

    asked = 0

    def get(self, *key):
        self.asked += 1
        return super().get(*key)

    def __contains__(self, key):
        self.asked += 1
        return super().__contains__(key)


@pytest.mark.parametrize("letters", ["a", "acgt", "abcdefghijklmnopqrstuvwxyz"])
def test_applying_to_a_row_ten_times_as_long_asks_ten_times_as_often(letters):
    rng = random.Random(1)
    row = rng.choices(letters, k=100_000)
    learned = merges.learn({tuple(row[:1000]): 1}, 100, text)
    asked = []
    for length in (10_000, 100_000):
        ranks = Counting({pair: (rank, "".join(pair)) for rank, pair in enumerate(learned)})
        assert "".join(merges.apply(row[:length], ranks)) == "".join(row[:length])
        asked.append(ranks.asked)
    assert asked[1] <= 11 * asked[0]
