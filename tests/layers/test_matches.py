"""The window's own votes, against loops over every pair of places."""

import math

import pytest
import torch

from quire.layers.matches import Matches


def by_loops(tokens: list[int], place: int, length: int, documents: list[int]) -> dict[int, float]:
    """The votes for what follows `place`, token by token."""
    votes: dict[int, float] = {}
    for other in range(place):
        agreed = 0
        while (
            agreed < 2 * length
            and other - agreed >= 0
            and tokens[place - agreed] == tokens[other - agreed] >= 0
            and documents[place] == documents[other - agreed]
        ):
            agreed += 1
        if agreed >= max(1, length // 2):
            following = tokens[other + 1]
            votes[following] = votes.get(following, 0.0) + 1 / (1 + math.exp(length - agreed))
    whole = max(1.0, sum(votes.values()))
    return {token: vote / whole for token, vote in votes.items()}


@pytest.mark.parametrize("length", [1, 2, 3, 6])
@pytest.mark.parametrize("new", [1, 7, 40])
@pytest.mark.parametrize("apart", [False, True])
def test_every_earlier_place_that_read_the_same_votes(length: int, new: int, apart: bool) -> None:
    torch.manual_seed(length)
    tokens = torch.randint(0, 3, (3, 40))
    tokens[1, :9] = -1  # padding agrees with nothing, not even with padding
    documents = (torch.arange(40) // 15).expand(3, 40)
    found = Matches.find(tokens, new, length, documents if apart else None)
    numbers = documents if apart else torch.zeros_like(tokens)
    each = torch.zeros(3, new, 3)
    for row in range(3):
        for t in range(new):
            votes = by_loops(tokens[row].tolist(), 40 - new + t, length, numbers[row].tolist())
            for token, vote in votes.items():
                each[row, t, token] = vote
    assert bool((each > 0).any()) and float(each.sum(-1).max()) <= 1 + 1e-6
    torch.testing.assert_close(found.of_each(3), each)
    torch.testing.assert_close(found.all(), each.sum(-1))
    targets = torch.randint(0, 3, (3, new))
    torch.testing.assert_close(found.of(targets), each.gather(-1, targets.unsqueeze(-1)).squeeze(-1))


def test_a_window_of_one_token_has_no_votes() -> None:
    found = Matches.find(torch.tensor([[4]]), 1, 6)
    assert found.all().tolist() == [[0.0]] and found.of_each(5).tolist() == [[[0.0] * 5]]


def test_long_agreement_outweighs_short() -> None:
    text = "the owl sat. the owl ate. a fowl s"
    letters = sorted(set(text))
    tokens = torch.tensor([[letters.index(letter) for letter in text]])
    votes = Matches.find(tokens, 1, 4).of_each(len(letters))[0, 0]
    assert letters[int(votes.argmax())] == "a"  # "owl s" was read once, "owl a" does not agree
    assert float(votes.max()) == pytest.approx(1 / (1 + math.exp(4 - 5)))
