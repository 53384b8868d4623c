"""GPT: a stack of causal attention and feedforward blocks (Radford et al. 2019).

GPT-2 with each part exchangeable, so that one can go from Vaswani's decoder to Qwen3's one part at a time.
"""

import math
from dataclasses import dataclass
from typing import Literal

from quire.layers.attention import MultiHeadAttention
from quire.layers.blocks import BLOCKS, PreNormBlock
from quire.layers.feedforward import FeedForward, SwiGLU
from quire.layers.layer import Layer
from quire.layers.normalization import LayerNorm, RMSNorm
from quire.layers.positions import LearnedPositions, RotaryPositions, SinusoidalPositions
from quire.models.decoder import Decoder, DecoderSettings


@dataclass(frozen=True)
class GPTSettings(DecoderSettings):
    """Shape and parts of a GPT; the defaults are GPT-2's."""

    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"  # how a token knows its place
    rotary_base: float = 10000.0  # base of the rotary angles, "theta" elsewhere
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"  # of the stream: centred and scaled, or scaled alone
    norm_placement: Literal["pre", "post"] = "pre"  # before each part (GPT-2) or after each sum (Vaswani)
    feedforward: Literal["gelu-tanh", "gelu", "relu", "squared-relu", "swiglu"] = "gelu-tanh"  # its curve
    bias: bool = True  # biases in linear layers and layer norms

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "rotary":
            self.check_rotary()

    def normalization_layer(self) -> Layer:
        """A fresh normalization of the stream."""
        if self.normalization == "rmsnorm":
            return RMSNorm(self.embedding_size, self.norm_epsilon)
        return LayerNorm(self.embedding_size, self.bias, self.norm_epsilon)

    def feedforward_layer(self) -> FeedForward | SwiGLU:
        """A fresh feedforward part."""
        hidden = self.feedforward_size or 4 * self.embedding_size
        if self.feedforward == "swiglu":
            return SwiGLU(self.embedding_size, hidden, self.bias)
        return FeedForward(self.embedding_size, hidden, self.feedforward, self.bias)

    def attention_layer(self, rotary: RotaryPositions | None) -> MultiHeadAttention:
        """A fresh attention."""
        return MultiHeadAttention(
            self.embedding_size,
            self.heads,
            self.kv_heads or self.heads,
            self.head_channels,
            bias=self.bias,
            qk_norm=self.qk_norm,
            epsilon=self.norm_epsilon,
            rotary=rotary,
            dropout=self.dropout,
        )


class GPT(Decoder):
    """A decoder of the parts that its settings name."""

    Settings = GPTSettings

    def __init__(self, settings: GPTSettings) -> None:
        size, scale = settings.embedding_size, 1.0
        rotary: RotaryPositions | None = None
        positions: Layer | None = None
        if settings.positions == "rotary":
            rotary = RotaryPositions(settings.head_channels, settings.rotary_base)
        elif settings.positions == "learned":
            positions = LearnedPositions(settings.context_length, size)
        else:  # Waves of amplitude 1 would drown embeddings of 0.02: Vaswani et al. (3.4) scale the embeddings up.
            positions, scale = SinusoidalPositions(size), math.sqrt(size)

        def block() -> PreNormBlock:
            attention, feedforward = settings.attention_layer(rotary), settings.feedforward_layer()
            return BLOCKS[settings.norm_placement](
                attention, feedforward, settings.normalization_layer, settings.dropout
            )

        super().__init__(
            settings,
            [block() for _ in range(settings.layers)],
            norm=settings.normalization_layer() if settings.norm_placement == "pre" else None,
            rotary=rotary,
            positions=positions,
            embedding_scale=scale,
        )
