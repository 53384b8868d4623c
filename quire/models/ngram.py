"""A modern decoder that looks up the last tokens too: hashed n-gram embeddings, added at its input.

What a counting model knows at once (which letter follows "wher") is looked up in large tables, of which each step
touches few rows; the decoder on top learns the rest. Not a pure Transformer, and no other program reads it: it is
always named. The tables are in layers/ngram_embedding.py, the optimizer that they want in training/adagrad.py.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from quire.errors import UserError
from quire.layers.cache import KeyValueCache
from quire.layers.ngram_embedding import NgramCache, NgramEmbedding
from quire.models.modern import Modern, ModernSettings

FEWEST, MOST = 1 << 10, 1 << 17  # rows of an order's table, where nothing else is said
TOKENS_A_ROW = 8  # of the training text, about: the row count is the power of two above


@dataclass(frozen=True)
class NgramSettings(ModernSettings):
    """A modern decoder, and which n-grams it looks up."""

    ngram_orders: tuple[int, ...] = (2, 3, 4, 5, 6)  # how many tokens, the last ones, each table is looked up by
    ngram_rows: int = 0  # rows of each order's table; when training, 0 becomes a number that suits the text's length
    ngram_dropout: float = 0.0  # share of the looked-up vectors that are left out while training

    def __post_init__(self) -> None:
        super().__post_init__()
        orders = self.ngram_orders
        if not orders or len(set(orders)) < len(orders) or not all(2 <= order <= 32 for order in orders):
            raise UserError(
                "--model.ngram-orders must name different numbers of tokens from 2 to 32, for example 2 3 4,"
                f" not {' '.join(map(str, orders)) or 'none'}."
            )
        if not 0 <= self.ngram_rows <= 1 << 31:
            raise UserError(f"--model.ngram-rows must be between 0 and {1 << 31}, not {self.ngram_rows}.")
        if not 0 <= self.ngram_dropout < 1:
            raise UserError(f"--model.ngram-dropout must be at least 0 and below 1, not {self.ngram_dropout}.")

    def sized(self, tokens: int) -> "NgramSettings":
        rows = 1 << max(0, tokens // TOKENS_A_ROW - 1).bit_length()
        return replace(self, ngram_rows=self.ngram_rows or min(max(rows, FEWEST), MOST))


class Ngram(Modern):
    """A modern decoder whose input is a token's vector and those of the n-grams that it ends."""

    Settings = NgramSettings
    Cache = NgramCache

    def __init__(self, settings: NgramSettings) -> None:
        super().__init__(settings)
        self.ngram_embedding = NgramEmbedding(
            settings.vocabulary_size,
            settings.embedding_size,
            settings.ngram_orders,
            settings.ngram_rows or MOST,
            settings.ngram_dropout,
        )

    def embed(self, tokens: Tensor, cache: KeyValueCache | None, mask: Tensor | None, begins: Tensor | None) -> Tensor:
        known = cache.append_tokens(tokens) if isinstance(cache, NgramCache) else tokens
        return super().embed(tokens, cache, mask, begins) + self.ngram_embedding(known, tokens.shape[1], mask, begins)

    def embed_backward(self, grad: Tensor) -> None:
        self.ngram_embedding.backward(grad)
        super().embed_backward(grad)
