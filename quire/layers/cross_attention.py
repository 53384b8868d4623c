"""Attention from one sequence to another: a decoder's positions gather from what an encoder made of the source.

B batch, T positions that look, S positions of the source, C channels, H heads, D head size.
"""

from torch import Tensor

from quire.layers.attention import ScaledDotProductAttention
from quire.layers.layer import Layer
from quire.layers.linear import Linear


def source_visibility(mask: Tensor) -> Tensor:
    """Which positions of a source may be looked at, (B, 1, 1, S); `mask` (B, S) is False on padding.

    Of a row that is padding altogether all may be: it yields numbers, never NaN, and nobody asks for them.
    """
    return (mask | ~mask.any(1, keepdim=True))[:, None, None, :]


class CrossAttention(Layer):
    """Queries from x (B, T, C), keys and values from memory (B, S, C), to (B, T, C) (Vaswani et al. 2017, 3.2.3)."""

    def __init__(self, size: int, heads: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_size = size // heads
        self.query = Linear(size, size, bias)
        self.key = Linear(size, size, bias)
        self.value = Linear(size, size, bias)
        self.attend = ScaledDotProductAttention(dropout)
        self.output = Linear(size, size, bias)

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What `memory` (B, S, C) offers, each (B, H, S, D): the same for every position that will look at it."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def forward(self, x: Tensor, memory: Tensor, visible: Tensor, known: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`visible` as `source_visibility` gives it; `known` are memory's keys and values, where they were kept."""
        query = self._split(self.query(x))
        key, value = known if known is not None else self.keys_and_values(memory)
        mixed = self.attend(query, key, value, visible)  # (B, H, T, D)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        # Queries came from x alone; keys and values both from the memory, which receives the sum of the two.
        mixed = self._split(self.output.backward(grad))
        query, key, value = (part.transpose(1, 2).flatten(2) for part in self.attend.backward(mixed))
        return self.query.backward(query), self.value.backward(value) + self.key.backward(key)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, H, T, D)."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
