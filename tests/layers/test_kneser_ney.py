"""The counted n-gram model, against one written out with dictionaries, straight from the paper."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from quire.layers.kneser_ney import KneserNey, discounts, kneser_ney

VERSES = " ".join(f"{n} owls and {n * n % 17} rivers under {'café' if n % 3 else '森'}\n" for n in range(90))


def by_dictionaries(training: list[int], held_out: list[int], vocabulary: int, order: int) -> float:
    """Chen and Goodman's interpolated model, one probability at a time."""
    whole = training + held_out
    counts: dict[int, Counter] = {}
    for n in range(1, order + 1):
        grams = [tuple(training[i : i + n]) for i in range(len(training) - n + 1)]
        counts[n] = Counter(grams)
        if n < order:
            longer = {tuple(training[i : i + n + 1]) for i in range(len(training) - n)}
            counts[n] = Counter(gram[1:] for gram in longer)
    taken, following = {}, {}
    for n, table in counts.items():
        values = Counter(table.values())
        if all(values[k] for k in (1, 2, 3, 4)):
            share = values[1] / (values[1] + 2 * values[2])
            taken[n] = {k: k - (k + 1) * share * values[k + 1] / values[k] for k in (1, 2, 3)}
            taken[n] = {k: min(max(value, 0.05), k - 0.05) for k, value in taken[n].items()}
        else:
            taken[n] = {1: 0.5, 2: 0.5, 3: 0.5}
        following[n] = defaultdict(list)
        for gram, count in table.items():
            following[n][gram[:-1]].append((gram[-1], count))

    def probability(context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = probability(context[1:], token) if context else 1 / vocabulary
        seen = following[n].get(context)
        if not seen:
            return lower
        total = sum(count for _, count in seen)
        own = dict(seen).get(token, 0)
        mass = sum(taken[n][min(count, 3)] for _, count in seen)
        return (own - (taken[n][min(own, 3)] if own else 0) + mass * lower) / total

    start = len(training)
    each = [math.log(probability(tuple(whole[i - order + 1 : i]), whole[i])) for i in range(start, len(whole))]
    return -sum(each) / len(each)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("text", [VERSES, "abracadabra " * 6 + "abrakadabra", "aaaaaaaaaaaaaaaaaaaab"])
def test_it_is_the_model_of_the_paper(text: str, order: int) -> None:
    characters = sorted(set(text))
    tokens = [characters.index(character) for character in text]
    cut = len(tokens) * 4 // 5
    found = kneser_ney(np.array(tokens[:cut]), np.array(tokens[cut:]), len(characters), order)
    assert found.shape == (order,)
    expected = [by_dictionaries(tokens[:cut], tokens[cut:], len(characters), n) for n in range(1, order + 1)]
    assert found == pytest.approx(np.array(expected), abs=1e-12)


def test_probabilities_of_all_that_may_follow_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    training = rng.integers(0, 6, 400)  # of a vocabulary of 8: two are never seen
    sums = np.zeros(3)
    for token in range(8):
        sums += np.exp(-kneser_ney(training, np.array([token]), 8, 3))
    assert sums == pytest.approx(np.ones(3), abs=1e-12)


def test_discounts_are_at_most_what_they_are_taken_from() -> None:
    counts = torch.tensor([1] * 40 + [2] * 3 + [3] * 30 + [4] * 50 + [9])
    assert bool((discounts(counts) <= torch.tensor([0, 1, 2, 3])).all())
    assert discounts(torch.tensor([7, 8])).tolist() == [0, 0.5, 0.5, 0.5]


def test_what_is_written_after_a_text_and_what_a_target_gets_are_the_same_probability() -> None:
    rng = np.random.default_rng(1)
    counted = KneserNey.count(rng.integers(0, 5, 3000), 7, 4)
    tokens = torch.from_numpy(rng.integers(-1, 7, (3, 12)))  # -1 is padding: nothing is known across it
    targets = torch.from_numpy(rng.integers(0, 7, (3, 9)))
    whole = counted.distribution(tokens, 9)
    assert whole.sum(-1) == pytest.approx(np.ones((3, 9)), abs=1e-12)
    assert torch.equal(whole.gather(-1, targets.unsqueeze(-1)).squeeze(-1), counted.probability(tokens, targets))
    longest = counted.distribution(tokens[:, -4:], 1)  # no more than order - 1 tokens matter
    assert torch.equal(longest[:, 0], whole[:, -1])


def test_what_stood_only_at_the_beginning_of_the_text_still_has_a_next_token() -> None:
    counted = KneserNey.count(np.array([4, 1, 2, 1, 3, 1, 2, 2, 1]), 5, 3)  # nothing ever stands before "4 1"
    for token in range(5):
        assert counted.distribution(torch.tensor([[token]]), 1).sum() == pytest.approx(1.0, abs=1e-12)
    everything = torch.tensor([[4] * 5]), torch.arange(5).unsqueeze(0)
    assert bool(counted.probability(*everything).isfinite().all())


def test_behind_a_separator_nothing_is_known_of_what_was_before() -> None:
    tokens = np.random.default_rng(3).integers(0, 6, 2000)
    apart = KneserNey.from_tables(KneserNey.count(tokens, 6, 4).tables(), 6, separator=5)
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[5, 0, 2, 4]])
    alone = apart.distribution(second, 4)
    torch.testing.assert_close(apart.distribution(torch.cat([first, second], 1), 7)[:, 3:], alone, rtol=0, atol=0)
    assert alone.sum(-1) == pytest.approx(np.ones((1, 4)), abs=1e-12)


def test_it_is_restored_from_its_tables() -> None:
    tokens = np.random.default_rng(2).integers(0, 9, 500)
    counted = KneserNey.count(tokens, 9, 5)
    again = KneserNey.from_tables(counted.tables(), 9)
    text = torch.from_numpy(tokens[:40]).unsqueeze(0)
    assert torch.equal(again.distribution(text, 40), counted.distribution(text, 40))
