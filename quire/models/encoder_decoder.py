"""The Transformer of "Attention Is All You Need" (Vaswani et al. 2017): an encoder reads a source, a decoder writes
a target while it looks at what the encoder made of the source.

B batch, S positions of the source, T new positions of the target, C channels (embedding_size), V vocabulary, H heads,
D head size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quire.errors import UserError
from quire.layers.attention import MultiHeadAttention, Visible
from quire.layers.blocks import BLOCKS, PostNormBlock, PreNormBlock
from quire.layers.cache import KeyValueCache
from quire.layers.cross_attention import CrossAttention, source_visibility
from quire.layers.cross_entropy import IGNORED
from quire.layers.dropout import Dropout
from quire.layers.embedding import Embedding
from quire.layers.feedforward import FeedForward
from quire.layers.head_loss import HeadLoss
from quire.layers.layer import Layer
from quire.layers.linear import Linear, OutputHead
from quire.layers.normalization import LayerNorm
from quire.layers.positions import SinusoidalPositions
from quire.layers.sparsity import Pattern, Sight
from quire.models.settings import ModelSettings


@dataclass(frozen=True)
class EncoderDecoderSettings(ModelSettings):
    """Shape of an encoder-decoder; the defaults are the paper's base model."""

    reads_source: ClassVar[bool] = True  # what is written answers a source

    kind: str = "encoder-decoder"  # which architecture
    context_length: int = 512  # tokens of a source, and of a target with its end, at most
    embedding_size: int = 512  # channels of the stream between blocks
    layers: int = 6  # blocks of the decoder
    encoder_layers: int = 0  # blocks of the encoder; 0: as many as layers
    heads: int = 8  # in each attention
    feedforward_size: int = 2048  # hidden channels of the feedforward; 0: 4 x embedding_size
    norm_placement: Literal["post", "pre"] = "post"  # after each sum (the paper), or before each part
    norm_epsilon: float = 1e-5  # added to the variance
    tied: bool = True  # source embedding, target embedding and output head are one matrix
    dropout: float = 0.1  # on embeddings, attention weights and each part's output
    label_smoothing: float = 0.1  # in training: the share of the wanted distribution that is spread over all tokens

    def __post_init__(self) -> None:
        for name in ("embedding_size", "layers", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"--model.{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        for name in ("encoder_layers", "feedforward_size"):
            if getattr(self, name) < 0:
                raise UserError(f"--model.{name.replace('_', '-')} must be positive, or 0 for the usual number.")
        if self.context_length < 2:
            raise UserError(f"--model.context-length must be at least 2, not {self.context_length}.")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"--model.{name.replace('_', '-')} must be at least 0 and below 1, not {getattr(self, name)}."
                )
        if self.embedding_size % self.heads:
            raise UserError(
                f"--model.embedding-size {self.embedding_size} cannot be divided among {self.heads} heads:"
                " choose a multiple of --model.heads."
            )
        if self.separate_documents:
            raise UserError("--model.separate-documents is for streams of text: leave it out, pairs are apart already.")


BlockParts = tuple[MultiHeadAttention, FeedForward, Callable[[], LayerNorm], float]


def block_parts(settings: EncoderDecoderSettings) -> BlockParts:
    """What the blocks of both sides are made of: attention, feedforward, normalization and dropout."""
    size, heads = settings.embedding_size, settings.heads
    attention = MultiHeadAttention(size, heads, heads, size // heads, dropout=settings.dropout)
    feedforward = FeedForward(size, settings.feedforward_size or 4 * size, "relu")
    return attention, feedforward, partial(LayerNorm, size, epsilon=settings.norm_epsilon), settings.dropout


class DecoderBlock(PreNormBlock):
    """Every position of the target looks back at those before it, then at the source, then a feedforward."""

    def __init__(self, settings: EncoderDecoderSettings) -> None:
        super().__init__(*block_parts(settings))
        self.cross_attention = CrossAttention(settings.embedding_size, settings.heads, dropout=settings.dropout)
        self.cross_norm = LayerNorm(settings.embedding_size, epsilon=settings.norm_epsilon)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        visible: Visible,
        memory: Tensor | None,
        source_visible: Tensor,
        cache: "EncoderDecoderCache | None",
        layer: int,
    ) -> Tensor:
        own = cache.target if cache is not None else None
        known = cache.source[layer] if cache is not None else None
        x = self.add(x, self.attention_norm, self.attention, None, visible, own, layer)
        x = self.add(x, self.cross_norm, self.cross_attention, memory, source_visible, known)
        return self.add(x, self.feedforward_norm, self.feedforward)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The gradients of the stream and of the memory."""
        of_memory: list[Tensor] = []

        def undo_cross_attention(grad: Tensor) -> Tensor:
            grad, memory = self.cross_attention.backward(grad)
            of_memory.append(memory)
            return grad

        grad = self.undo_add(grad, self.feedforward_norm, self.feedforward.backward)
        grad = self.undo_add(grad, self.cross_norm, undo_cross_attention)
        return self.undo_add(grad, self.attention_norm, self.attention.backward), of_memory[0]


class PostNormDecoderBlock(DecoderBlock, PostNormBlock):
    """The same, each sum normalized: `add` and `undo_add` are PostNormBlock's."""


DECODER_BLOCKS = {"pre": DecoderBlock, "post": PostNormDecoderBlock}


class EncoderDecoderCache:
    """What is remembered of a source, made once: each layer's keys and values of it; and those of the target so far.

    `source` is for each layer a pair of (B, H, S, D), `source_visible` (B, 1, 1, S); `target` grows token by token.
    """

    def __init__(self, target: KeyValueCache) -> None:
        self.target = target
        self.source: list[tuple[Tensor, Tensor]] = []
        self.source_visible: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions of the target so far."""
        return self.target.length

    def remember(self, source: Sequence[tuple[Tensor, Tensor]], visible: Tensor) -> None:
        """Keep what every layer will ask of the source."""
        self.source, self.source_visible = list(source), visible

    def cut(self, length: int) -> None:
        """Forget all but the first `length` positions of the target."""
        self.target.cut(length)

    def copy(self) -> "EncoderDecoderCache":
        """An independent copy. What is remembered of the source is never written to again, and shared."""
        other = EncoderDecoderCache(self.target.copy())
        other.source, other.source_visible = list(self.source), self.source_visible
        return other

    def reordered(self, rows: Tensor) -> "EncoderDecoderCache":
        """A new cache whose row i is this one's row rows[i]; rows may repeat or be left out."""
        other = EncoderDecoderCache(self.target.reordered(rows))
        other.source = [(keys[rows], values[rows]) for keys, values in self.source]
        other.source_visible = None if self.source_visible is None else self.source_visible[rows]
        return other


class EncoderDecoder(Layer):
    """A source (B, S) and the tokens of a target (B, T) in; logits (B, T, V), or the mean loss, out."""

    Settings = EncoderDecoderSettings

    def __init__(self, settings: EncoderDecoderSettings) -> None:
        super().__init__()
        assert settings.vocabulary_size > 0, "the vocabulary size is set from the tokenizer before a model is built"
        self.settings = settings
        size, placement = settings.embedding_size, settings.norm_placement
        encoder_layers = settings.encoder_layers or settings.layers
        self.source_embedding = Embedding(settings.vocabulary_size, size)
        self.token_embedding = Embedding(settings.vocabulary_size, size)
        self.positions = SinusoidalPositions(size)
        self.source_dropout, self.dropout = Dropout(settings.dropout), Dropout(settings.dropout)
        self.encoder = nn.ModuleList(BLOCKS[placement](*block_parts(settings)) for _ in range(encoder_layers))
        self.encoder_norm = None if placement == "post" else LayerNorm(size, epsilon=settings.norm_epsilon)
        self.decoder = nn.ModuleList(DECODER_BLOCKS[placement](settings) for _ in range(settings.layers))
        self.norm = None if placement == "post" else LayerNorm(size, epsilon=settings.norm_epsilon)
        self.head = OutputHead(size, settings.vocabulary_size)
        self.loss = HeadLoss(settings.label_smoothing)
        self.initialize()
        self.tie()

    def tie(self) -> None:
        """Let both embeddings and the output head share one matrix (3.4), where the settings say so."""
        if self.settings.tied:
            self.token_embedding.weight = self.head.weight = self.source_embedding.weight

    def initialize(self) -> None:
        """Draw fresh weights from torch's default generator.

        Maps as Glorot and Bengio (2010): uniform within sqrt(6 / (inputs + outputs)). Embeddings normal with deviation
        0.02, of which the paper says nothing: small enough beside the waves that attention soon finds its way by
        position too.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                bound = math.sqrt(6 / sum(module.weight.shape))
                nn.init.uniform_(module.weight, -bound, bound)
            elif isinstance(module, Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        mask: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T); or the loss against `targets` (B, T), a scalar.

        `source` (B, S) is IGNORED on padding, `mask` (B, T) False. A `cache` holds what came before `tokens`, and is
        extended by them; with one, the source is given in the first call alone.
        """
        memory, source_visible = self.encode(source) if source is not None else (None, None)
        if cache is not None:
            if memory is not None and source_visible is not None:
                cache.remember([self.block(n).cross_attention.keys_and_values(memory) for n in self.depths()],
                               source_visible)  # fmt: skip
            source_visible = cache.source_visible
        assert source_visible is not None, "an encoder-decoder is called with a source, or a cache that has one"
        new = tokens.shape[1]
        past = cache.length if cache is not None else 0
        if cache is not None:
            mask, _ = cache.target.extended(mask, None, tokens)
        sight = Sight.of(new, past, tokens.device, mask)  # in which padding takes no position
        visible = sight.visible(Pattern(), past)
        x = self.dropout(self.embed(self.token_embedding, tokens, sight.positions[..., past:]))
        for layer in self.depths():
            x = self.block(layer).run(x, visible, memory, source_visible, cache, layer)
        if self.norm is not None:
            x = self.norm(x)
        if cache is not None:
            cache.target.advance(new, mask)
        if targets is None:
            return self.head(x)  # (B, T, V)
        return self.loss.of(self.head, x, targets)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder makes of a source (B, S): the memory (B, S, C), and where it may be looked at."""
        mask = source != IGNORED
        visible = source_visibility(mask)
        positions = Sight.of(source.shape[1], 0, source.device, mask).positions
        x = self.source_dropout(self.embed(self.source_embedding, source.masked_fill(~mask, 0), positions))
        for block in self.encoder:
            assert isinstance(block, PreNormBlock)
            x = block.run(x, None, visible)
        return (x if self.encoder_norm is None else self.encoder_norm(x)), visible

    def embed(self, embedding: Embedding, tokens: Tensor, positions: Tensor) -> Tensor:
        """Vectors (B, T, C): embeddings, times sqrt(C) so that the waves do not drown them (3.4), plus the waves."""
        x = embedding(tokens) * math.sqrt(self.settings.embedding_size)
        return x + self.positions(positions).to(x.dtype)

    def backward(self, grad: Tensor | float = 1.0) -> None:
        """Undo the last recorded loss: add `grad` times its gradient to every parameter's `.grad`."""
        scale = math.sqrt(self.settings.embedding_size)
        gradient = self.loss.undo(grad, self.head)
        if self.norm is not None:
            gradient = self.norm.backward(gradient)
        from_layers = []
        for layer in reversed(self.depths()):
            gradient, memory = self.block(layer).undo(gradient)
            from_layers.append(memory)
        self.token_embedding.backward(self.dropout.backward(gradient) * scale)
        memory = torch.stack(from_layers).sum(0)  # every layer of the decoder looked at the memory
        if self.encoder_norm is not None:
            memory = self.encoder_norm.backward(memory)
        for block in reversed(self.encoder):
            assert isinstance(block, PreNormBlock)
            memory = block.undo(memory)
        self.source_embedding.backward(self.source_dropout.backward(memory) * scale)

    def depths(self) -> range:
        """The numbers of the decoder's layers."""
        return range(len(self.decoder))

    def block(self, layer: int) -> DecoderBlock:
        """A layer of the decoder."""
        found = self.decoder[layer]
        assert isinstance(found, DecoderBlock)
        return found

    def new_cache(self, batch: int) -> EncoderDecoderCache:
        """An empty cache for `batch` rows of up to context_length positions of a target."""
        settings, weight = self.settings, self.token_embedding.weight
        heads, size = settings.heads, settings.embedding_size // settings.heads
        capacity, where = settings.context_length, (weight.device, weight.dtype)
        return EncoderDecoderCache(KeyValueCache([None] * settings.layers, batch, heads, capacity, size, *where))
