"""Pairs of a source and a target as training examples, in a seeded order that can be resumed anywhere.

The token stream is [separator] source [separator] target [separator] source ..., as of documents that are sources and
targets by turns. A model with an encoder is given

    source   the source's tokens             inputs   [separator] target      targets   target [separator]

and a model without one a single row, of which only the target counts:

    inputs   [separator] source [separator] target          targets   ignored ... ignored, target [separator]

A pair that does not fit the context length is left out, in training as in measuring.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from quire.data.batches import EVERY, Batch, Cursor
from quire.data.shards import TokenStream
from quire.layers.cross_entropy import IGNORED
from quire.tokenizers import Tokenizer

STEP = 1 << 22  # tokens searched for separators at once
ALIKE, POOL = 64, 64  # pairs of about one length stand in groups of ALIKE, chosen among POOL times as many


Examples: TypeAlias = "np.ndarray | TokenStream | Pairs"  # what a loss is summed over


class Pairs:
    """The pairs of a token stream that fit `context_length`; `reads_source` says whether the model has an encoder.

    The order is a function of seed, epoch and position alone.
    """

    def __init__(
        self, tokens: np.ndarray | TokenStream, separator: int, context_length: int, seed: int, reads_source: bool
    ) -> None:
        self.tokens, self.separator, self.context_length = tokens, separator, context_length
        self.seed, self.reads_source = seed, reads_source
        found = [at + np.flatnonzero(tokens[at : at + STEP] == separator) for at in range(0, len(tokens), STEP)]
        places = np.concatenate([*found, [len(tokens)]])
        assert len(places) % 2 == 1, "a source has a target"
        starts, sizes = places[:-1].reshape(-1, 2), np.diff(places).reshape(-1, 2)
        # Of source and target alike, `sizes` counts the separator before it.
        fit = sizes[:, 0] <= context_length + 1 if reads_source else sizes.sum(1) <= context_length
        fit &= (sizes[:, 1] <= context_length) & (sizes > 1).all(1)  # unknown characters may have left nothing
        self.starts, self.sizes = starts[fit], sizes[fit]
        self.left_out = len(sizes) - len(self.sizes)
        self._epoch = -1

    def __len__(self) -> int:
        """Tokens to predict: those of the targets, and their ends."""
        return int(self.sizes[:, 1].sum())

    def examples(self) -> int:
        """Pairs."""
        return len(self.sizes)

    def tokens_each(self) -> float:
        """Tokens to predict in a pair, on average."""
        return len(self) / self.examples()

    def epoch(self, number: int) -> np.ndarray:
        """The order in which that epoch takes the pairs: shuffled, but with others of about their length."""
        if number != self._epoch:
            generator = np.random.default_rng([self.seed, number])
            order = generator.permutation(self.examples())
            # What is drawn together is filled up to the longest of it: the groups of a pool are alike in length.
            for first in range(0, len(order), ALIKE * POOL):
                pool = order[first : first + ALIKE * POOL]
                pool = pool[: len(pool) // ALIKE * ALIKE]  # what makes no whole group stays as it is, at the end
                alike = pool[np.argsort(self.sizes[pool].sum(1), kind="stable")].reshape(-1, ALIKE)
                pool[:] = generator.permutation(alike).ravel()
            self._epoch, self._order = number, order
        return self._order

    def take(self, cursor: Cursor, count: int, share: slice = EVERY) -> Batch:
        """Of the next `count` pairs the `share`; moves the cursor, across the end of an epoch where needed."""
        rows: list[int] = []
        while len(rows) < count:
            order = self.epoch(cursor.epoch)
            taken = order[cursor.position : cursor.position + count - len(rows)].tolist()
            rows += taken
            cursor.position += len(taken)
            if cursor.position == len(order):
                cursor.epoch, cursor.position = cursor.epoch + 1, 0
        return replace(self.batch(rows[share]), among=int(self.sizes[rows, 1].sum()))

    def batch(self, rows: Sequence[int]) -> Batch:
        """Pairs by their numbers, filled up on the right to the longest of them."""
        parts = [self.ids(row) for row in rows]
        if self.reads_source:
            inputs = [[self.separator, *target] for _, target in parts]
            targets = [[*target, self.separator] for _, target in parts]
            return Batch(_filled(inputs, 0), _filled(targets, IGNORED), sum(map(len, targets)),
                         _filled([source for source, _ in parts], IGNORED))  # fmt: skip
        inputs = [[self.separator, *source, self.separator, *target] for source, target in parts]
        targets = [[*[IGNORED] * (1 + len(source)), *target, self.separator] for source, target in parts]
        return Batch(_filled(inputs, 0), _filled(targets, IGNORED), sum(len(target) + 1 for _, target in parts))

    def ids(self, row: int) -> tuple[list[int], list[int]]:
        """The tokens of a source and of its target."""
        (first, second), (long, wide) = self.starts[row].tolist(), self.sizes[row].tolist()
        return self.tokens[first + 1 : first + long].tolist(), self.tokens[second + 1 : second + wide].tolist()

    def whole(self, tokens: int) -> Iterator[Batch]:
        """Every pair once, the longest first, in batches of about so many tokens."""
        order = np.argsort(-self.sizes.sum(1), kind="stable")
        while len(order):
            count = max(1, tokens // int(self.sizes[order[0]].sum()))
            yield self.batch(order[:count].tolist())
            order = order[count:]

    def target_bytes(self, tokenizer: Tokenizer) -> int:
        """The UTF-8 bytes of all targets."""
        return sum(len(tokenizer.decode(self.ids(row)[1]).encode()) for row in range(self.examples()))


def _filled(rows: list[list[int]], filling: int) -> Tensor:
    """Rows of any lengths as one tensor, int64, filled up on the right."""
    filled = np.full((len(rows), max(map(len, rows))), filling, dtype=np.int64)
    for number, row in enumerate(rows):
        filled[number, : len(row)] = row
    return torch.from_numpy(filled)
