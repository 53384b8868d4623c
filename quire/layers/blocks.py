"""Transformer blocks: attention, then feedforward, each added to a stream that runs through all blocks."""

from collections.abc import Callable

from torch import Tensor

from quire.layers.attention import MultiHeadAttention, Visible
from quire.layers.cache import KeyValueCache
from quire.layers.dropout import Dropout
from quire.layers.feedforward import FeedForward, SwiGLU
from quire.layers.layer import Block, Layer
from quire.layers.linear import Linear

Angles = tuple[Tensor, Tensor] | None  # cosine and sine of rotary positions
Cache = KeyValueCache | None


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
        x = x + self.dropout(self.attention(self.attention_norm(x), angles, visible, cache, layer))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))

    def backward(self, grad: Tensor) -> Tensor:
        # Of a sum, both terms receive the gradient: the stream as it is, and the part that was added to it.
        grad = grad + self.feedforward_norm.backward(self.feedforward.backward(self.dropout.backward(grad)))
        return grad + self.attention_norm.backward(self.attention.backward(self.dropout.backward(grad)))


class PostNormBlock(PreNormBlock):
    """norm(x + attention(x)), then norm(x + feedforward(x)) (Vaswani et al. 2017)."""

    def forward(
        self,
        x: Tensor,
        angles: Angles = None,
        visible: Visible = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, angles, visible, cache, layer)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))

    def backward(self, grad: Tensor) -> Tensor:
        grad = self.feedforward_norm.backward(grad)
        grad = grad + self.feedforward.backward(self.dropout.backward(grad))
        grad = self.attention_norm.backward(grad)
        return grad + self.attention.backward(self.dropout.backward(grad))


BLOCKS = {"pre": PreNormBlock, "post": PostNormBlock}
