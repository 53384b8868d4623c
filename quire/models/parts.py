"""What models are built of that list their layers: parts, each with norm, dropout and residual if wanted, one after
another from the embedding to the head.

B batch, T new positions, S all positions (past and new), C channels, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quire.layers.attention import MultiHeadAttention, Visible
from quire.layers.cache import KeyValueCache, Past
from quire.layers.dropout import Dropout
from quire.layers.embedding import Embedding
from quire.layers.head_loss import HeadLoss
from quire.layers.layer import Block, Layer
from quire.layers.linear import OutputHead
from quire.layers.normalization import LayerNorm, RMSNorm
from quire.layers.recurrent import RNN, Memory
from quire.layers.sparsity import Pattern, Sight
from quire.models.settings import ModelSettings

NORMALIZATIONS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


@dataclass(frozen=True)
class Reading:
    """What the parts may know of the tokens that are being read."""

    mask: Tensor | None = None  # (B, T), False on padding; None: all are tokens
    starts: Tensor | None = None  # (B, T), True where a document begins; None: nobody asked
    positions: Tensor | None = None  # (T) or (B, T): how many tokens stand before; made where a part asks for it
    visible: Visible = None  # who may look at whom; likewise


class Part(Block):
    """dropout(inner(norm(x))), with x added to it where it is residual: (B, T, C) to (B, T, C')."""

    looks_back = False  # whether it wants positions and visibility

    def __init__(
        self, inner: Layer, normalization: Layer | None = None, dropout: float = 0.0, residual: bool = False
    ) -> None:
        super().__init__()
        self.normalization = normalization
        self.inner = inner
        self.dropout = Dropout(dropout)
        self.residual = residual

    def forward(self, x: Tensor, reading: Reading, memory: Any = None) -> Tensor:
        y = x if self.normalization is None else self.normalization(x)
        y = self.dropout(self.read(y, reading, memory))
        return x + y if self.residual else y

    def backward(self, grad: Tensor) -> Tensor:
        inner = self.inner.backward(self.dropout.backward(grad))
        if self.normalization is not None:
            inner = self.normalization.backward(inner)
        return grad + inner if self.residual else inner

    def read(self, x: Tensor, reading: Reading, memory: Any) -> Tensor:
        """The inner layer's output."""
        return self.inner(x)

    def new_memory(self, batch: int, context_length: int) -> Any:
        """What it remembers of past positions, empty; None if nothing."""
        return None


class RecurrentPart(Part):
    """dropout(inner(norm(x))), with x added to it where it is residual; `inner` is a recurrent layer."""

    inner: RNN

    def read(self, x: Tensor, reading: Reading, memory: Memory | None) -> Tensor:
        return self.inner(x, reading.mask, reading.starts, memory)

    def new_memory(self, batch: int, context_length: int) -> Memory:
        return Memory()


class AttentionPart(Part):
    """dropout(inner(norm(x))), with x added to it where it is residual; `inner` is causal self-attention."""

    looks_back = True
    inner: MultiHeadAttention

    def read(self, x: Tensor, reading: Reading, memory: KeyValueCache | None) -> Tensor:
        rotary = self.inner.rotary
        angles = rotary.angles(reading.positions) if rotary is not None and reading.positions is not None else None
        return self.inner(x, angles, reading.visible, memory)

    def new_memory(self, batch: int, context_length: int) -> KeyValueCache:
        weight, size = self.inner.key.weight, self.inner.head_size
        heads = len(weight) // size
        return KeyValueCache([None], batch, heads, context_length, size, weight.device, weight.dtype)


class PositionPart(Part):
    """x + a vector for each position, learned or of waves."""

    looks_back = True

    def forward(self, x: Tensor, reading: Reading, memory: Any = None) -> Tensor:
        assert reading.positions is not None
        self.save(reading.positions.dim())
        return x + self.inner(reading.positions).to(x.dtype)

    def backward(self, grad: Tensor) -> Tensor:
        (dimensions,) = self.saved()
        # One row of positions serves every row of the batch: its gradient is their sum.
        self.inner.backward(grad.sum(0) if dimensions == 1 else grad)
        return grad


class PartsCache(Past):
    """What each part remembers, side by side; None where it is nothing."""

    def __init__(self, memories: list[Any]) -> None:
        super().__init__()
        self.memories = memories

    def advance(self, count: int, mask: Tensor | None, begins: Tensor | None = None) -> None:
        super().advance(count, mask, begins)
        for memory in filter(None, self.memories):
            memory.length = self.length

    def cut(self, length: int) -> None:
        """Forget all but the first `length` positions; a ValueError, and nothing forgotten, where a recurrent state
        stands between, which only nothing and all of it can be kept of."""
        for memory in sorted(filter(None, self.memories), key=lambda memory: not isinstance(memory, Memory)):
            memory.cut(length)  # recurrent ones first: they alone refuse, and all of them alike
        super().cut(length)

    def copy(self) -> "PartsCache":
        """An independent copy."""
        other = PartsCache([None if memory is None else memory.copy() for memory in self.memories])
        other.take(self, slice(None))
        return other

    def reordered(self, rows: Tensor) -> "PartsCache":
        """A new cache whose row i is this one's row rows[i]; rows may repeat or be left out."""
        other = PartsCache([None if memory is None else memory.reordered(rows) for memory in self.memories])
        other.take(self, rows)
        return other


class PartsModel(Layer):
    """Tokens (B, T) through the parts, one after another: logits (B, T, V), or the mean loss where targets are given.

    A model on top of it names its parts and how its weights begin.
    """

    def __init__(self, settings: ModelSettings, size: int, parts: list[Part], outputs: int, tied: bool) -> None:
        """`size` channels of the embedding, `outputs` of the last part; `tied`: the head has the embedding's."""
        super().__init__()
        assert settings.vocabulary_size > 0, "the vocabulary size is set from the tokenizer before a model is built"
        assert settings.separator >= 0 or not settings.separate_documents, "and so is the separator"
        self.settings = settings
        self.token_embedding = Embedding(settings.vocabulary_size, size)
        self.blocks = nn.ModuleList(parts)
        self.looks_back = any(part.looks_back for part in parts)
        self.head = OutputHead(outputs, settings.vocabulary_size)
        self.loss = HeadLoss()
        if tied:
            self.head.weight = self.token_embedding.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: PartsCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T); or the loss against `targets` (B, T), a scalar.

        `mask` (B, T) is False on padding. A `cache` holds what came before `tokens`, and is extended by them.
        """
        starts = self.settings.document_begins(tokens, mask)
        whole_mask, begins = cache.extended(mask, starts, tokens) if cache is not None else (mask, starts)
        reading = Reading(mask, starts)
        if self.looks_back:
            past = cache.length if cache is not None else 0
            sight = Sight.of(tokens.shape[1], past, tokens.device, whole_mask, begins)
            positions = sight.positions[..., past:]
            reading = Reading(mask, starts, positions, sight.visible(Pattern(), past))
        x = self.token_embedding(tokens)  # (B, T, C)
        memories = cache.memories if cache is not None else [None] * len(self.blocks)
        for part, memory in zip(self.blocks, memories, strict=True):
            assert isinstance(part, Part)
            x = part.run(x, reading, memory)
        if cache is not None:
            cache.advance(tokens.shape[1], whole_mask, begins)
        if targets is None:
            return self.head(x)  # (B, T, V)
        return self.loss.of(self.head, x, targets)

    def backward(self, grad: Tensor | float = 1.0) -> None:
        """Undo the last recorded loss: add `grad` times its gradient to every parameter's `.grad`."""
        gradient = self.loss.undo(grad, self.head)
        for part in reversed(self.blocks):
            assert isinstance(part, Part)
            gradient = part.undo(gradient)
        self.token_embedding.backward(gradient)

    def new_cache(self, batch: int) -> PartsCache:
        """An empty cache for `batch` rows."""
        parts = [part for part in self.blocks if isinstance(part, Part)]
        return PartsCache([part.new_memory(batch, self.settings.context_length) for part in parts])
