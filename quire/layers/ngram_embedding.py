"""Vectors for the last n tokens: what stood before a token, looked up and not computed.

Each order n has a table. A small table has a row for every n-gram there may be; in a larger one the n-gram's hash says
which row is its own, and n-grams that fall on the same row share it (feature hashing: Weinberger et al. 2009; of
n-grams: Bojanowski et al. 2017; at a language model's input: Huang et al. 2025, "Over-Tokenized Transformer").

B batch, T positions asked for, S all positions known (past and new), C channels, N orders, R rows of all tables.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.layers.cache import KeyValueCache
from quire.layers.layer import Layer, add_grad

# The hash of symbols s_0 (the token itself), s_1 (the one before) ... is h <- (h + s) A mod P, from h = 0: a polynomial
# in A (Karp and Rabin 1987). Every number is below 2^62, so that any language with 64-bit integers computes the same.
# How small the changes d_i of symbols may be that leave the hash as it is (sum of d_i A^i = 0 mod P) is what the
# spectral test of random generators measures: A is the multiplier that Fishman and Moore (1986) found best among all
# for this prime.
PRIME = 2**31 - 1
MULTIPLIER = 742938285


class NgramEmbedding(Layer):
    """Tokens (B, S) give, for the last T positions, the sum of their n-grams' vectors, (B, T, C); zero at first.

    A symbol is a token's id + 1, and 0 on padding and before the document: `mask` (B, S) is False on padding, `begins`
    (B, S) True where a document begins that does not know of the one before. Order n has `rows` rows, or
    (vocabulary_size + 1)^n where those are fewer; `weight` (R, C) has all orders' tables one below the other. While
    training each order's vector is dropped with probability `dropout`, position by position.

    Its gradient has a row for each row looked up, and is sparse for both engines, with repeated rows that are to be
    added up (an uncoalesced torch.sparse_coo); `sparse` False gives the same as a dense tensor, as large as all tables.
    """

    sparse = True

    def __init__(self, vocabulary_size: int, size: int, orders: Sequence[int], rows: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.symbols = vocabulary_size + 1
        self.orders = sorted(orders)
        self.rows = [min(rows, self.symbols**order) for order in self.orders]
        self.starts = [0, *itertools.accumulate(self.rows)][:-1]
        self.weight = nn.Parameter(torch.empty(sum(self.rows), size))
        nn.init.zeros_(self.weight)
        self.dropout = dropout

    def forward(self, tokens: Tensor, new: int, mask: Tensor | None = None, begins: Tensor | None = None) -> Tensor:
        rows = self.places(tokens, new, mask, begins)  # (B, T, N)
        vectors = F.embedding(rows, self.weight, sparse=self.sparse)  # (B, T, N, C)
        keep = None
        if self.training and self.dropout:
            keep = F.dropout(vectors.new_ones(*rows.shape, 1), self.dropout)  # (B, T, N, 1): 0 or 1 / (1 - p)
            vectors = vectors * keep
        self.save(rows, keep)
        return vectors.sum(2)

    def backward(self, grad: Tensor) -> None:
        # y = sum over n of keep_n w[row_n]: each row looked up receives the gradient of y there, times its keep_n.
        rows, keep = self.saved()
        grads = grad.unsqueeze(2).expand(*rows.shape, -1)  # (B, T, N, C)
        grads = (grads if keep is None else grads * keep).flatten(0, -2).to(self.weight.dtype)
        if self.sparse:
            shape = self.weight.shape
            add_grad(self.weight, torch.sparse_coo_tensor(rows.view(1, -1), grads, shape, check_invariants=False))
        else:
            add_grad(self.weight, torch.zeros_like(self.weight).index_add_(0, rows.flatten(), grads))

    def places(self, tokens: Tensor, new: int, mask: Tensor | None = None, begins: Tensor | None = None) -> Tensor:
        """The row of `weight` that each order has for each of the last `new` positions (B, T, N)."""
        reach, skipped = self.orders[-1] - 1, tokens.shape[1] - new
        symbols = tokens + 1 if mask is None else (tokens + 1).masked_fill(~mask, 0)
        symbols = F.pad(symbols, (reach, 0))[:, skipped:]  # (B, reach + T)
        hashed = exact = torch.zeros_like(tokens[:, skipped:])
        apart = None  # whether a document begins between the symbol and the token
        places = []
        for back in range(reach + 1):
            symbol = symbols[:, reach - back : reach - back + new]  # (B, T)
            if begins is not None:
                symbol = symbol if apart is None else symbol.masked_fill(apart, 0)
                crossed = F.pad(begins, (reach, 0))[:, skipped:][:, reach - back : reach - back + new]
                apart = crossed if apart is None else apart | crossed
            hashed = (hashed + symbol) * MULTIPLIER % PRIME
            exact = exact * self.symbols + symbol
            if back + 1 in self.orders:
                number = self.orders.index(back + 1)
                rows, start = self.rows[number], self.starts[number]
                # hash / 2^31 of the way through the table.
                row = exact if rows == self.symbols ** (back + 1) else hashed * rows >> 31
                places.append(row + start)
        return torch.stack(places, -1)

    @torch.no_grad()
    def grown(self, weight: Tensor, vocabulary_size: int) -> Tensor:
        """This layer's tables with the vectors in `weight`, those of a layer alike but for its smaller vocabulary.

        An n-gram of the smaller vocabulary keeps its vector, all others have none yet. Hashes know no vocabulary: where
        both layers hash, the table stays as it is.
        """
        smaller = NgramEmbedding(vocabulary_size, 0, self.orders, max(self.rows))
        tables = torch.zeros_like(self.weight)
        for number, order in enumerate(self.orders):
            rows, old = (slice(of.starts[number], of.starts[number] + of.rows[number]) for of in (self, smaller))
            if smaller.rows[number] == smaller.symbols**order:  # a row for each n-gram: -1 is the symbol 0
                each = torch.cartesian_prod(*[torch.arange(-1, vocabulary_size)] * order).view(-1, order)
                here, there = (of.places(each, 1)[:, 0, number] for of in (self, smaller))
                tables[here] = weight[there]
            else:
                tables[rows] = weight[old]
        return tables


class NgramCache(KeyValueCache):
    """Keys and values, and the tokens themselves, (B, capacity): the n-grams of new tokens begin among old ones."""

    def __init__(self, *shape: Any) -> None:
        """`shape` is what a KeyValueCache is made of."""
        super().__init__(*shape)
        keys = self.keys[0]
        self.tokens = torch.zeros(len(keys), self.capacity, dtype=torch.long, device=keys.device)

    def append_tokens(self, tokens: Tensor) -> Tensor:
        """Put new tokens (B, T) behind the old; gives all of them (B, S)."""
        end = self.length + tokens.shape[1]
        self.tokens[:, self.length : end] = tokens
        return self.tokens[:, :end]

    def reordered(self, rows: Tensor) -> "NgramCache":
        other = super().reordered(rows)
        assert isinstance(other, NgramCache)
        other.tokens = self.tokens[rows]
        return other
