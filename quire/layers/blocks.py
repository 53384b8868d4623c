"""Transformer blocks: attention, then feedforward, each added to a stream that runs through all blocks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quire.layers.attention import MultiHeadAttention, Visible
from quire.layers.cache import KeyValueCache
from quire.layers.dropout import Dropout
from quire.layers.feedforward import FeedForward, SwiGLU
from quire.layers.layer import Block, Layer
from quire.layers.linear import Linear

Angles = tuple[Tensor, Tensor] | None  # cosine and sine of rotary positions


class PreNormBlock(Block):
    """x + attention(norm(x)), then x + feedforward(norm(x)): the stream itself is never normalized (GPT-2)."""

    def __init__(
        self,
        attention: MultiHeadAttention,
        feedforward: FeedForward | SwiGLU,
        normalization: Callable[[], Layer],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = normalization()
        self.attention = attention
        self.feedforward_norm = normalization()
        self.feedforward = feedforward
        self.dropout = Dropout(dropout)

    def projections(self) -> tuple[Linear, Linear]:
        """The two maps whose output is added to the stream."""
        return self.attention.output, self.feedforward.down

    def forward(
        self,
        x: Tensor,
        angles: Angles = None,
        visible: Visible = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = self.add(x, self.attention_norm, self.attention, angles, visible, cache, layer)
        return self.add(x, self.feedforward_norm, self.feedforward)

    def backward(self, grad: Tensor) -> Tensor:
        grad = self.undo_add(grad, self.feedforward_norm, self.feedforward.backward)
        return self.undo_add(grad, self.attention_norm, self.attention.backward)

    # ---- what the two kinds differ in ----

    def add(self, x: Tensor, norm: Layer, part: Layer, *inputs: Any) -> Tensor:
        """The stream after a part, which is given `inputs` too."""
        return x + self.dropout(part(norm(x), *inputs))

    def undo_add(self, grad: Tensor, norm: Layer, undo_part: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient by the stream before a part; `undo_part` is the part's backward."""
        # Of a sum, both terms receive the gradient: the stream as it is, and the part that was added to it.
        return norm.backward(undo_part(self.dropout.backward(grad))).add_(grad)


class PostNormBlock(PreNormBlock):
    """norm(x + attention(x)), then norm(x + feedforward(x)) (Vaswani et al. 2017)."""

    def add(self, x: Tensor, norm: Layer, part: Layer, *inputs: Any) -> Tensor:
        return norm(x + self.dropout(part(x, *inputs)))

    def undo_add(self, grad: Tensor, norm: Layer, undo_part: Callable[[Tensor], Tensor]) -> Tensor:
        grad = norm.backward(grad)
        return grad + undo_part(self.dropout.backward(grad))


BLOCKS: dict[str, type[PreNormBlock]] = {"pre": PreNormBlock, "post": PostNormBlock}
