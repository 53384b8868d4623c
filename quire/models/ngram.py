"""A modern decoder that knows n-grams in two ways: learned vectors at its input, and counts beside its output.

The last tokens are looked up in large tables, of which each step touches few rows (layers/ngram_embedding.py; their
optimizer is training/adagrad.py). And the training text is counted once (layers/kneser_ney.py): where the model is
measured and where it writes, it gives

    p(w | h) = (1 - share) p_network(w | h) + share p_counted(w | h)

the linear interpolation of Jelinek and Mercer (1980). Counting and learning err at different places, so both together
are far better than either. The network is trained alone, as if there were no counts: had it to learn only what they
leave over, it would trust them as one may on the text that was counted, and on no other.

Not a pure Transformer, and no other program reads it: it is always named.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.data.shards import TokenStream
from quire.errors import UserError
from quire.layers.cache import KeyValueCache
from quire.layers.cross_entropy import IGNORED
from quire.layers.kneser_ney import KneserNey
from quire.layers.ngram_embedding import NgramCache, NgramEmbedding
from quire.models.modern import Modern, ModernSettings

FEWEST, MOST = 1 << 10, 1 << 17  # rows of an order's table, where nothing else is said
TOKENS_A_ROW = 8  # of the training text, about: the row count is the power of two above
MOST_COUNTED = 1 << 21  # tokens of the training text, the last ones: three seconds and some 40 MB of counts


@dataclass(frozen=True)
class NgramSettings(ModernSettings):
    """A modern decoder, and which n-grams it looks up."""

    ngram_orders: tuple[int, ...] = (2, 3, 4, 5, 6)  # the last so many tokens have a table each; none: no tables
    ngram_rows: int = 0  # rows of each order's table; when training, 0 becomes a number that suits the text's length
    ngram_dropout: float = 0.0  # share of the looked-up vectors that are left out while training
    count_order: int = 8  # n-grams of up to so many tokens are counted in the training text; 0: none
    count_share: float = 0.5  # of what is predicted, the share that comes from the counts

    def __post_init__(self) -> None:
        super().__post_init__()
        orders = self.ngram_orders
        if len(set(orders)) < len(orders) or not all(2 <= order <= 32 for order in orders):
            raise UserError(
                "--model.ngram-orders must name different numbers of tokens from 2 to 32, for example 2 3 4,"
                f" not {' '.join(map(str, orders))}."
            )
        if not 0 <= self.ngram_rows <= 1 << 31:
            raise UserError(f"--model.ngram-rows must be between 0 and {1 << 31}, not {self.ngram_rows}.")
        if not 0 <= self.ngram_dropout < 1:
            raise UserError(f"--model.ngram-dropout must be at least 0 and below 1, not {self.ngram_dropout}.")
        if not 0 <= self.count_order <= 32:
            raise UserError(f"--model.count-order must be between 0 and 32, not {self.count_order}.")
        if not 0 < self.count_share < 1:
            raise UserError(f"--model.count-share must be above 0 and below 1, not {self.count_share}.")

    def sized(self, tokens: int) -> "NgramSettings":
        rows = 1 << max(0, tokens // TOKENS_A_ROW - 1).bit_length()
        return replace(self, ngram_rows=self.ngram_rows or min(max(rows, FEWEST), MOST))

    def count(self, tokens: np.ndarray | TokenStream) -> KneserNey | None:
        order = min(self.count_order, len(tokens))
        last = tokens[max(0, len(tokens) - MOST_COUNTED) :]
        return KneserNey.count(last, self.vocabulary_size, order) if order else None


class Ngram(Modern):
    """A modern decoder whose input is a token's vector and those of the n-grams that it ends."""

    Settings = NgramSettings
    Cache = NgramCache
    settings: NgramSettings
    counts: KneserNey | None = None  # of the training text; a run gives them to its model

    def __init__(self, settings: NgramSettings) -> None:
        super().__init__(settings)
        size, orders = settings.embedding_size, settings.ngram_orders
        rows, dropout = settings.ngram_rows or MOST, settings.ngram_dropout
        self.ngram_embedding = NgramEmbedding(settings.vocabulary_size, size, orders, rows, dropout) if orders else None

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As Decoder.forward; with counts, in evaluation mode, logarithms of probabilities (B, T, V), or their loss.

        A recorded loss, and so every gradient, is the network's alone.
        """
        if self.counts is None or self.training or self.tape is not None:
            return super().forward(tokens, targets, cache, mask)
        network = F.log_softmax(super().forward(tokens, None, cache, mask), -1)
        if isinstance(cache, NgramCache):
            tokens, mask = cache.tokens[:, : cache.length], cache.mask
        new, reach = network.shape[1], len(self.counts.orders)
        known = (tokens if mask is None else tokens.masked_fill(~mask, -1))[:, -(new + reach) :]
        share = self.settings.count_share
        if targets is None:
            counted = self.counts.distribution(known, new)
            return torch.logaddexp(network + math.log(1 - share), (share * counted).log().to(network.dtype))
        wanted = targets.clamp(min=0)
        network = network.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        counted = self.counts.probability(known, wanted)
        gained = torch.logaddexp(network + math.log(1 - share), (share * counted).log().to(network.dtype))
        counting = targets != IGNORED
        return -(gained * counting).sum() / counting.sum().clamp(min=1)

    def embed(self, tokens: Tensor, cache: KeyValueCache | None, mask: Tensor | None, begins: Tensor | None) -> Tensor:
        known = cache.append_tokens(tokens) if isinstance(cache, NgramCache) else tokens
        x = super().embed(tokens, cache, mask, begins)
        if self.ngram_embedding is None:
            return x
        return x + self.ngram_embedding(known, tokens.shape[1], mask, begins)

    def embed_backward(self, grad: Tensor) -> None:
        if self.ngram_embedding is not None:
            self.ngram_embedding.backward(grad)
        super().embed_backward(grad)
