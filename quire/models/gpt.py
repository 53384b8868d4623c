"""GPT: a stack of causal attention and feedforward blocks (Radford et al. 2019, and its descendants).

One file for the family: GPT-2's and Vaswani's blocks, and the parts of Llama and Qwen3 as entries in small tables.
B batch, T new positions, C channels (embedding_size), V vocabulary, D head size.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from quire.errors import UserError
from quire.layers.attention import MultiHeadAttention, visibility
from quire.layers.cache import KeyValueCache
from quire.layers.cross_entropy import CrossEntropy
from quire.layers.dropout import Dropout
from quire.layers.embedding import Embedding
from quire.layers.feedforward import FeedForward, SwiGLU
from quire.layers.layer import Block, Layer
from quire.layers.linear import Linear, OutputHead
from quire.layers.normalization import LayerNorm, RMSNorm
from quire.layers.positions import LearnedPositions, RotaryPositions, SinusoidalPositions
from quire.models.settings import ModelSettings


@dataclass(frozen=True)
class GPTSettings(ModelSettings):
    """Shape and parts of a GPT; the defaults are GPT-2's."""

    embedding_size: int = 768  # channels of the stream between blocks
    layers: int = 12  # blocks
    heads: int = 12  # query heads in each attention
    kv_heads: int = 0  # key and value heads, a divisor of heads; 0: as many as heads
    head_size: int = 0  # channels of a head; 0: embedding_size / heads
    feedforward_size: int = 0  # hidden channels of the feedforward; 0: 4 x embedding_size
    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"  # how a token knows its place
    rotary_base: float = 10000.0  # base of the rotary angles, "theta" elsewhere
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"  # of the stream: centred and scaled, or scaled alone
    norm_placement: Literal["pre", "post"] = "pre"  # before each part (GPT-2) or after each sum (Vaswani)
    norm_epsilon: float = 1e-5  # added to the variance
    feedforward: Literal["gelu-tanh", "gelu", "relu", "squared-relu", "swiglu"] = "gelu-tanh"  # its curve
    bias: bool = True  # biases in linear layers and layer norms
    qk_norm: bool = False  # RMS-normalize each head's queries and keys (Qwen3)
    tied: bool = True  # the output head shares the token embedding's weights
    dropout: float = 0.0  # on embeddings, attention weights and each part's output
    initialization: Literal["gpt2", "zero-output"] = "gpt2"  # see initialize() in models/gpt.py

    def __post_init__(self) -> None:
        for name in ("embedding_size", "layers", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"--model.{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        if self.context_length < 2:
            raise UserError(f"--model.context-length must be at least 2, not {self.context_length}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--model.dropout must be at least 0 and below 1, not {self.dropout}.")
        if self.head_size == 0 and self.embedding_size % self.heads:
            raise UserError(
                f"--model.embedding-size {self.embedding_size} cannot be divided among {self.heads} heads:"
                " choose a multiple of --model.heads, or give --model.head-size."
            )
        if self.kv_heads and (self.kv_heads < 0 or self.heads % self.kv_heads):
            raise UserError(f"--model.heads {self.heads} is not a multiple of --model.kv-heads {self.kv_heads}.")
        if self.head_size < 0 or self.feedforward_size < 0:
            raise UserError("--model.head-size and --model.feedforward-size must be positive, or 0 for the usual size.")
        if self.positions == "rotary" and self.head_channels % 2:
            raise UserError(
                f"Rotary positions turn pairs of channels: the head size {self.head_channels} must be even."
            )

    @property
    def head_channels(self) -> int:
        """Channels of a head, D."""
        return self.head_size or self.embedding_size // self.heads

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


class PreNormBlock(Block):
    """x + attention(norm(x)), then x + feedforward(norm(x)): the stream itself is never normalized (GPT-2)."""

    def __init__(self, settings: GPTSettings, rotary: RotaryPositions | None) -> None:
        super().__init__()
        self.attention_norm = settings.normalization_layer()
        self.attention = MultiHeadAttention(
            settings.embedding_size,
            settings.heads,
            settings.kv_heads or settings.heads,
            settings.head_channels,
            bias=settings.bias,
            qk_norm=settings.qk_norm,
            epsilon=settings.norm_epsilon,
            rotary=rotary,
            dropout=settings.dropout,
        )
        self.feedforward_norm = settings.normalization_layer()
        self.feedforward = settings.feedforward_layer()
        self.dropout = Dropout(settings.dropout)

    def projections(self) -> tuple[Linear, Linear]:
        """The two maps whose output is added to the stream."""
        return self.attention.output, self.feedforward.down

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        visible: Tensor | None,
        cache: KeyValueCache | None,
        layer: int,
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
        angles: tuple[Tensor, Tensor] | None,
        visible: Tensor | None,
        cache: KeyValueCache | None,
        layer: int,
    ) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, angles, visible, cache, layer)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))

    def backward(self, grad: Tensor) -> Tensor:
        grad = self.feedforward_norm.backward(grad)
        grad = grad + self.feedforward.backward(self.dropout.backward(grad))
        grad = self.attention_norm.backward(grad)
        return grad + self.attention.backward(self.dropout.backward(grad))


BLOCKS = {"pre": PreNormBlock, "post": PostNormBlock}


class GPT(Layer):
    """Tokens (B, T) in; logits (B, T, V) out, or the mean loss where targets are given."""

    Settings = GPTSettings

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        assert settings.vocabulary_size > 0, "the vocabulary size is set from the tokenizer before a model is built"
        assert settings.separator >= 0 or not settings.separate_documents, "and so is the separator"
        self.settings = settings
        size, positions = settings.embedding_size, settings.positions
        rotary = RotaryPositions(settings.head_channels, settings.rotary_base) if positions == "rotary" else None
        self.token_embedding = Embedding(settings.vocabulary_size, size)
        self.rotary = rotary
        self.positions: Layer | None = None
        if positions == "learned":
            self.positions = LearnedPositions(settings.context_length, size)
        elif positions == "sinusoidal":
            self.positions = SinusoidalPositions(size)
        # Waves of amplitude 1 would drown embeddings of 0.02: Vaswani et al. (3.4) scale the embeddings up.
        self.embedding_scale = math.sqrt(size) if positions == "sinusoidal" else 1.0
        self.dropout = Dropout(settings.dropout)
        self.blocks = nn.ModuleList(BLOCKS[settings.norm_placement](settings, rotary) for _ in range(settings.layers))
        self.norm = settings.normalization_layer() if settings.norm_placement == "pre" else None
        self.head = OutputHead(size, settings.vocabulary_size)
        self.loss = CrossEntropy()
        self.initialize()
        self.tie()

    def tie(self) -> None:
        """Let the output head share the token embedding's weights, where the settings say so."""
        if self.settings.tied:
            self.head.weight = self.token_embedding.weight

    def initialize(self) -> None:
        """Draw fresh weights from torch's default generator.

        gpt2: normal with deviation 0.02, output projections of each part times 1 / sqrt(2 layers) (Radford et al.
        2019). zero-output: matrices normal with deviation 1 / sqrt(inputs), output projections and an untied head
        zero, so that pre-norm blocks begin as the identity (as in modded-nanogpt).
        """
        settings = self.settings
        for module in self.modules():
            if isinstance(module, Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, Linear):
                wide = settings.initialization == "zero-output"
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5 if wide else 0.02)
        for block in self.blocks:
            assert isinstance(block, PreNormBlock)
            for projection in block.projections():
                if settings.initialization == "zero-output":
                    nn.init.zeros_(projection.weight)
                else:
                    nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * settings.layers))
        if settings.initialization == "zero-output" and not settings.tied:
            nn.init.zeros_(self.head.weight)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T); or the loss against `targets` (B, T), a scalar.

        `mask` (B, T) is False on padding. A `cache` holds what came before `tokens`, and is extended by them.
        """
        batch, new = tokens.shape
        past = cache.length if cache is not None else 0
        begins = self.document_begins(tokens, mask)
        if cache is not None:
            mask = cache.extended_mask(mask, batch, new)
            begins = None if begins is None else cache.extended_begins(begins)
        segments = None if begins is None else begins.cumsum(1)  # (B, S): how many documents have begun
        visible = visibility(new, past, mask, tokens.device, segments)
        if segments is not None:
            assert visible is not None
            positions = visible[:, 0].sum(-1) - 1  # (B, T): as many as a token sees before it
        elif mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T): padding takes no position
        else:
            positions = torch.arange(past, past + new, device=tokens.device)  # (T)
        angles = self.rotary.angles(positions) if self.rotary is not None else None

        x = self.token_embedding(tokens) * self.embedding_scale  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
            self.save(positions.dim())
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, PreNormBlock)
            x = block.run(x, angles, visible, cache, layer)
        if self.norm is not None:
            x = self.norm(x)
        if cache is not None:
            cache.advance(new, mask, begins)
        if targets is None:
            return self.head(x)  # (B, T, V)
        return self.loss(self.head(x, padded=True), targets)

    def document_begins(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """True on the separators among `tokens` (B, T), each of which begins a document; None where all is one."""
        if not self.settings.separate_documents:
            return None
        begins = tokens == self.settings.separator
        return begins if mask is None else begins & mask

    def backward(self, grad: Tensor | float = 1.0) -> None:
        """Undo the last recorded loss: add `grad` times its gradient to every parameter's `.grad`."""
        gradient = self.head.backward(self.loss.backward(grad))
        if self.norm is not None:
            gradient = self.norm.backward(gradient)
        for block in reversed(self.blocks):
            assert isinstance(block, PreNormBlock)
            gradient = block.undo(gradient)
        gradient = self.dropout.backward(gradient)
        if self.positions is not None:
            (rows,) = self.saved()
            # One row of positions serves every row of the batch: its gradient is their sum.
            self.positions.backward(gradient.sum(0) if rows == 1 else gradient)
        self.token_embedding.backward(gradient * self.embedding_scale)

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache for `batch` rows of up to context_length positions."""
        settings = self.settings
        weight = self.token_embedding.weight
        heads = settings.kv_heads or settings.heads
        return KeyValueCache(
            settings.layers, batch, heads, settings.context_length, settings.head_channels, weight.device, weight.dtype
        )
