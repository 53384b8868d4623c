"""Small models that remember in other ways than by keys and values, and count what they are asked to read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.layers.cross_entropy import IGNORED


class Remembered:
    """The state (B) after `length` tokens; like any recurrent state it cannot be cut."""

    def __init__(self, state: Tensor, length: int = 0) -> None:
        self.state, self.length = state, length

    def cut(self, length: int) -> None:
        if length < self.length:
            raise ValueError("a state cannot be taken back")

    def copy(self) -> "Remembered":
        return Remembered(self.state.clone(), self.length)

    def reordered(self, rows: Tensor) -> "Remembered":
        return Remembered(self.state[rows], self.length)


class Automaton:
    """A recurrent model without weights: its state is a number, stirred by each token; each state has its logits.

    With `source` it begins from a number that depends on every token of the source, and on their order.
    `asked` has the numbers of tokens of each call, padding and all rows counted.
    """

    STATES = 97

    def __init__(self, vocabulary: int, context_length: int = 1000, seed: int = 0) -> None:
        self.settings = SimpleNamespace(context_length=context_length)
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(self.STATES, vocabulary, generator=generator) * 2
        self.asked: list[int] = []

    def new_cache(self, batch: int) -> Remembered:
        return Remembered(torch.zeros(batch, dtype=torch.long))

    def __call__(
        self, tokens: Tensor, cache: Any = None, mask: Tensor | None = None, source: Tensor | None = None
    ) -> Tensor:
        self.asked.append(tokens.numel())
        state = torch.zeros(len(tokens), dtype=torch.long) if cache is None else cache.state
        if source is not None:
            for column in source.T:
                state = torch.where(column == IGNORED, state, (state * 7 + column + 1) % self.STATES)
        states = []
        for place, column in enumerate(tokens.T):
            stirred = (state * 5 + column + 3) % self.STATES
            state = stirred if mask is None else torch.where(mask[:, place], stirred, state)
            states.append(state)
        if cache is not None:
            cache.state, cache.length = state, cache.length + tokens.shape[1]
        return self.logits[torch.stack(states, 1)]


@pytest.fixture
def automaton() -> type[Automaton]:
    """The class of recurrent models without weights."""
    return Automaton
