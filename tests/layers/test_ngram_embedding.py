"""N-gram embeddings: which row an n-gram has, against plain Python; and what padding, documents and dropout do."""

import itertools

import pytest
import torch
from torch import Tensor

from quire.layers.layer import recording
from quire.layers.ngram_embedding import NgramEmbedding

TOKENS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))


def filled(layer: NgramEmbedding) -> NgramEmbedding:
    layer.weight.data = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))
    return layer.double()


def row(ngram: list[int], vocabulary_size: int, rows: int) -> int:
    """The row of an n-gram, its newest token first, None for padding, as the layer's page says it; plain Python."""
    symbols = [0 if token is None else token + 1 for token in ngram]
    if (vocabulary_size + 1) ** len(symbols) <= rows:
        return sum(s * (vocabulary_size + 1) ** i for i, s in enumerate(reversed(symbols)))
    hashed = 0
    for symbol in symbols:
        hashed = (hashed + symbol) * 742938285 % (2**31 - 1)
    return hashed * rows // 2**31


@pytest.mark.parametrize("rows", [100, 3000, 1 << 17, (1 << 31) - 5])
def test_rows_are_those_of_plain_python_on_every_machine(rows):
    layer = NgramEmbedding(50, 0, (6, 2, 3), rows)
    places, first = layer.places(TOKENS, 40), 0
    for number, order in enumerate((2, 3, 6)):
        for line, tokens in enumerate(TOKENS.tolist()):
            padded = [None] * (order - 1) + tokens
            expected = [row(padded[t : t + order][::-1], 50, rows) + first for t in range(40)]
            assert places[line, :, number].tolist() == expected
        first += min(rows, 51**order)
    assert first == len(layer.weight)


def test_a_known_row_stays_what_it_is():
    """Weights belong to rows: a hash that changed would make every trained run useless."""
    layer = NgramEmbedding(1000, 0, (2, 4), 1 << 16)
    assert layer.places(torch.tensor([[5, 17, 999, 0]]), 1).flatten().tolist() == [49434, 125132]


def test_where_a_table_has_room_no_two_ngrams_share_a_row():
    layer = NgramEmbedding(6, 0, (2, 3), 7**3)
    every = torch.tensor(list(itertools.product(range(-1, 6), repeat=3)))  # -1: padding
    places = layer.places(every, 1)
    assert len(places[:, 0, 1].unique()) == 7**3 and len(places[:, 0, 0].unique()) == 7**2


@pytest.mark.parametrize("order", [2, 3, 4])
def test_hashes_spread_like_random_numbers(order):
    """As many different rows as throwing balls into bins gives, for n-grams of neighbouring ids."""
    side = round(40_000 ** (1 / order))
    every = torch.cartesian_prod(*[torch.arange(100, 100 + side)] * order)
    rows = 1 << 15
    layer = NgramEmbedding(1 << 17, 0, (order,), rows)
    expected = rows * (1 - (1 - 1 / rows) ** len(every))
    assert len(layer.places(every, 1).unique()) > 0.97 * expected


def test_the_sum_is_that_of_torch_s_embedding_bag():
    layer = filled(NgramEmbedding(50, 4, (2, 3, 5), 200))
    expected = torch.nn.functional.embedding_bag(layer.places(TOKENS, 40).view(-1, 3), layer.weight, mode="sum")
    torch.testing.assert_close(layer(TOKENS, 40).view(-1, 4), expected)


def test_padding_and_the_document_before_are_as_nothing_before():
    layer = filled(NgramEmbedding(50, 4, (2, 4), 300))
    alone = layer(TOKENS[:, 13:], 27)
    mask = (torch.arange(40) >= 13).expand(2, 40)
    torch.testing.assert_close(layer(TOKENS, 40, mask)[:, 13:], alone)
    begins = (torch.arange(40) == 13).expand(2, 40)
    apart = layer(TOKENS, 40, None, begins)
    torch.testing.assert_close(apart[:, 13:], alone)
    torch.testing.assert_close(apart[:, :13], layer(TOKENS[:, :13], 13))
    assert not torch.allclose(layer(TOKENS, 40)[:, 13:], alone)


def test_an_empty_table_adds_nothing_and_vectors_are_dropped_whole():
    assert not NgramEmbedding(50, 4, (2, 3), 300)(TOKENS, 40).any()
    layer = NgramEmbedding(50, 8, (2, 3, 4), 300, dropout=0.25)
    layer.weight.data.fill_(1.0)
    torch.manual_seed(3)
    counts = torch.cat([layer(TOKENS, 40).view(-1, 8) for _ in range(20)]) * 0.75
    assert (counts == counts[:, :1]).all() and set(counts.unique().round().tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert float(counts.mean()) == pytest.approx(3 * 0.75, rel=0.03)  # of three vectors
    assert (layer.eval()(TOKENS, 40) == 3).all()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_gradients_are_sparse_or_dense_and_add_up(engine, sparse):
    layer = filled(NgramEmbedding(50, 4, (2, 3, 5), 200))
    layer.sparse = sparse
    grad, expected = torch.randn(2, 40, 4, dtype=torch.float64), torch.zeros_like(layer.weight)
    expected.index_put_((layer.places(TOKENS, 40),), grad.unsqueeze(2).expand(2, 40, 3, 4), accumulate=True)

    def once() -> Tensor:
        if engine == "autograd":
            layer(TOKENS, 40).backward(grad)
        else:
            with torch.no_grad(), recording(layer):
                layer(TOKENS, 40)
                layer.backward(grad)
        assert layer.weight.grad.is_sparse == sparse
        return layer.weight.grad.to_dense()

    for times in (1, 2, 3):
        torch.testing.assert_close(once(), times * expected)


@pytest.mark.parametrize("rows", [30, 250, 2000])  # hashed and hashed; one of them exact before, or after too
def test_a_larger_vocabulary_keeps_what_is_known(rows):
    small, large = filled(NgramEmbedding(5, 4, (2, 3), rows)), filled(NgramEmbedding(7, 4, (2, 3), rows))
    large.weight.data = large.grown(small.weight, 5)
    tokens = TOKENS % 5
    if rows == 250:  # trigrams move from rows of their own to shared ones
        assert small.rows[1] == 6**3 and large.rows[1] == 250
        small.weight.data[small.starts[1] :], large.weight.data[large.starts[1] :] = 0, 0
    torch.testing.assert_close(large(tokens, 40), small(tokens, 40))
