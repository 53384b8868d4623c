"""Batches of windows: every token predicted once an epoch, in a seeded order that can be resumed anywhere.

A stream of N tokens has M = N - 1 predictions, tokens[i + 1] from what stands before it. An epoch lays a grid of
windows of T (the context length) over them; from the second epoch on the grid is shifted by a seeded offset, so that
a token is not always seen with the same context. Short windows at the ends are filled with ignored targets.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quire.data.shards import TokenStream
from quire.layers.cross_entropy import IGNORED

EVERY = slice(None)  # the share of one who shares with nobody


@dataclass
class Cursor:
    """Where training stands in the data: the next example is number `position` of `epoch`."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Batch:
    """`inputs` and `targets` (B, T), int64; `counted` of the targets are to be predicted, the others are IGNORED.

    `among` is how many there are in the whole batch, of which this may be a process's share, or a part of that.
    `source` (B, S), where there is one, is what a model with an encoder reads first; its padding is IGNORED too.
    """

    inputs: Tensor
    targets: Tensor
    counted: int
    source: Tensor | None = None
    among: int = 0

    def arguments(self) -> dict[str, Tensor]:
        """What a model is called with to give the loss."""
        named = {"tokens": self.inputs, "targets": self.targets}
        return named if self.source is None else {**named, "source": self.source}

    def split(self, parts: int) -> list["Batch"]:
        """The same examples in `parts` smaller batches."""
        inputs, targets = self.inputs.tensor_split(parts), self.targets.tensor_split(parts)
        sources = [None] * parts if self.source is None else self.source.tensor_split(parts)
        each = zip(inputs, targets, sources, strict=True)
        return [Batch(i, t, int((t != IGNORED).sum()), s, self.among) for i, t, s in each]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        inputs, targets = _moved(self.inputs, device), _moved(self.targets, device)
        source = None if self.source is None else _moved(self.source, device)
        return Batch(inputs, targets, self.counted, source, self.among)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On a GPU of NVIDIA's from memory that stays in its place, so that nobody waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Batches:
    """The training examples of a token stream; the order is a function of seed, epoch and position alone."""

    def __init__(self, tokens: np.ndarray | TokenStream, context_length: int, seed: int) -> None:
        assert len(tokens) >= 2, "a stream needs two tokens for one prediction"
        self.tokens, self.context_length, self.seed = tokens, context_length, seed
        self._epoch = -1

    def epoch(self, number: int) -> tuple[int, np.ndarray]:
        """Offset of that epoch's grid, and the order in which its windows are taken."""
        if number != self._epoch:
            generator = np.random.default_rng([self.seed, number])
            offset = int(generator.integers(self.context_length)) if number else 0
            count = -(-(len(self.tokens) - 1 + offset) // self.context_length)
            self._epoch, self._offset, self._order = number, offset, generator.permutation(count)
        return self._offset, self._order

    def examples(self) -> int:
        """Windows in the first epoch."""
        return len(self.epoch(0)[1])

    def tokens_each(self) -> float:
        """Tokens to predict in a window."""
        return self.context_length

    def take(self, cursor: Cursor, count: int, share: slice = EVERY) -> Batch:
        """Of the next `count` examples the `share`; moves the cursor, across the end of an epoch where needed.

        Nothing is read of the tokens of the others.
        """
        rows: list[slice] = []
        while len(rows) < count:
            offset, order = self.epoch(cursor.epoch)
            for number in order[cursor.position : cursor.position + count - len(rows)]:
                start = int(number) * self.context_length - offset
                rows.append(slice(max(0, start), min(start + self.context_length, len(self.tokens) - 1)))
                cursor.position += 1
            if cursor.position == len(order):
                cursor.epoch, cursor.position = cursor.epoch + 1, 0
        return replace(cut(self.tokens, rows[share], self.context_length), among=sum(r.stop - r.start for r in rows))


def cut(tokens: np.ndarray | TokenStream, rows: list[slice], context_length: int) -> Batch:
    """A batch whose row i predicts from tokens[rows[i]] the tokens one further, filled up to the context length."""
    inputs = np.zeros((len(rows), context_length), dtype=np.int64)
    targets = np.full((len(rows), context_length), IGNORED, dtype=np.int64)
    if isinstance(tokens, TokenStream):
        tokens.fetch([slice(place.start, place.stop + 1) for place in rows])
    for row, place in enumerate(rows):
        width = place.stop - place.start
        inputs[row, :width] = tokens[place]
        targets[row, :width] = tokens[place.start + 1 : place.stop + 1]
    counted = sum(place.stop - place.start for place in rows)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), counted)
