"""What all decoders share: tokens in, a stack of attention and feedforward blocks, logits of the next token out.

models/gpt.py, models/modern.py and models/sparse.py say which parts the blocks are made of.
B batch, T new positions, C channels (embedding_size), V vocabulary, D head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from quire.errors import UserError
from quire.layers.blocks import PreNormBlock
from quire.layers.cache import KeyValueCache
from quire.layers.dropout import Dropout
from quire.layers.embedding import Embedding
from quire.layers.head_loss import HeadLoss
from quire.layers.layer import Layer
from quire.layers.linear import Linear, OutputHead
from quire.layers.positions import RotaryPositions
from quire.layers.sparsity import Pattern, Sight
from quire.models.settings import ModelSettings


@dataclass(frozen=True)
class DecoderSettings(ModelSettings):
    """The shape that every decoder has."""

    embedding_size: int = 768  # channels of the stream between blocks
    layers: int = 12  # blocks
    heads: int = 12  # query heads in each attention
    kv_heads: int = 0  # key and value heads, a divisor of heads; 0: as many as heads
    head_size: int = 0  # channels of a head; 0: embedding_size / heads
    feedforward_size: int = 0  # hidden channels of the feedforward; 0: 4 x embedding_size
    norm_epsilon: float = 1e-5  # added to the variance
    qk_norm: bool = False  # RMS-normalize each head's queries and keys (Qwen3)
    tied: bool = True  # the output head shares the token embedding's weights
    dropout: float = 0.0  # on embeddings, attention weights and each part's output
    initialization: Literal["gpt2", "zero-output"] = "gpt2"  # see initialize() in models/decoder.py

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

    def check_rotary(self) -> None:
        """Rotary positions turn pairs of channels."""
        if self.head_channels % 2:
            raise UserError(
                f"Rotary positions turn pairs of channels: the head size {self.head_channels} must be even."
            )

    @property
    def head_channels(self) -> int:
        """Channels of a head, D."""
        return self.head_size or self.embedding_size // self.heads


class Decoder(Layer):
    """Tokens (B, T) in; logits (B, T, V) out, or the mean loss where targets are given."""

    Cache: Any = KeyValueCache

    def __init__(
        self,
        settings: DecoderSettings,
        blocks: Sequence[PreNormBlock],
        *,
        norm: Layer | None,
        rotary: RotaryPositions | None = None,
        positions: Layer | None = None,
        embedding_scale: float = 1.0,
        patterns: Sequence[Pattern] = (Pattern(),),
    ) -> None:
        """`patterns` say what each block's attention looks at, and are repeated until every block has one."""
        super().__init__()
        assert settings.vocabulary_size > 0, "the vocabulary size is set from the tokenizer before a model is built"
        assert settings.separator >= 0 or not settings.separate_documents, "and so is the separator"
        self.settings = settings
        self.token_embedding = Embedding(settings.vocabulary_size, settings.embedding_size)
        self.rotary = rotary
        self.positions = positions
        self.embedding_scale = embedding_scale
        self.dropout = Dropout(settings.dropout)
        self.blocks = nn.ModuleList(blocks)
        self.patterns = [patterns[number % len(patterns)] for number in range(len(blocks))]
        self.norm = norm
        self.head = OutputHead(settings.embedding_size, settings.vocabulary_size)
        self.loss = HeadLoss()
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
        zero, so that pre-norm blocks begin as the identity (as in modded-nanogpt); untied embeddings with deviation
        0.3, which learn sooner than small ones.
        """
        settings = self.settings
        apart = settings.initialization == "zero-output" and not settings.tied
        for module in self.modules():
            if isinstance(module, Embedding):
                nn.init.normal_(module.weight, std=0.3 if apart else 0.02)
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
        if apart:
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
        new = tokens.shape[1]
        begins = self.settings.document_begins(tokens, mask)
        if cache is not None:
            mask, begins = cache.extended(mask, begins, tokens)
        sight = Sight.of(new, cache.length if cache is not None else 0, tokens.device, mask, begins)
        views = {
            pattern: sight.visible(pattern, cache.held(layer) if cache is not None else 0)
            for layer, pattern in enumerate(self.patterns)
        }
        positions = sight.positions[..., -new:]  # (T), or (B, T) where rows differ
        angles = self.rotary.angles(positions) if self.rotary is not None else None

        x = self.embed(tokens, cache, mask, begins)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
            self.save(positions.dim())
        x = self.dropout(x)
        for layer, (block, pattern) in enumerate(zip(self.blocks, self.patterns, strict=True)):
            assert isinstance(block, PreNormBlock)
            x = block.run(x, angles, views[pattern], cache, layer)
        if self.norm is not None:
            x = self.norm(x)
        if cache is not None:
            cache.advance(new, mask, begins)
        if targets is None:
            return self.head(x)  # (B, T, V)
        return self.loss.of(self.head, x, targets)

    def backward(self, grad: Tensor | float = 1.0) -> None:
        """Undo the last recorded loss: add `grad` times its gradient to every parameter's `.grad`."""
        gradient = self.loss.undo(grad, self.head)
        if self.norm is not None:
            gradient = self.norm.backward(gradient)
        for block in reversed(self.blocks):
            assert isinstance(block, PreNormBlock)
            gradient = block.undo(gradient)
        gradient = self.dropout.backward(gradient)
        if self.positions is not None:
            (dimensions,) = self.saved()
            # One row of positions serves every row of the batch: its gradient is their sum.
            self.positions.backward(gradient.sum(0) if dimensions == 1 else gradient)
        self.embed_backward(gradient)

    def embed(self, tokens: Tensor, cache: KeyValueCache | None, mask: Tensor | None, begins: Tensor | None) -> Tensor:
        """The vectors (B, T, C) of new tokens; `mask` and `begins` (B, S) are of those in the cache too."""
        return self.token_embedding(tokens) * self.embedding_scale

    def embed_backward(self, grad: Tensor) -> None:
        """Undo `embed`."""
        self.token_embedding.backward(grad * self.embedding_scale)

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache for `batch` rows of up to context_length positions."""
        settings, weight = self.settings, self.token_embedding.weight
        reaches = [pattern.reach for pattern in self.patterns]
        heads, channels = settings.kv_heads or settings.heads, settings.head_channels
        return self.Cache(reaches, batch, heads, settings.context_length, channels, weight.device, weight.dtype)
