"""A modern decoder that knows n-grams in three ways: learned vectors, counts of the text, and the window's own.

The last tokens are looked up in large tables, of which each step touches few rows (layers/ngram_embedding.py; their
optimizer is training/adagrad.py). The training text is counted once (layers/kneser_ney.py); and what stood in the
window already votes for what came next there (layers/matches.py). Where the model is measured and where it writes:

    p_0(w | h) = (1 - share) p_network(w | h) + share p_counted(w | h)            Jelinek and Mercer (1980)
    p(w | h) = (p_0(w | h) + votes for w) / (1 + all votes)

Counting, copying and learning err at different places, so all together are far better than any. The network is trained
alone, as if there were nothing else: had it to learn only what the counts leave over, it would trust them as one may on
the text that was counted, and on no other.

It may be trained in windows shorter than its context (--curriculum) where its attention reaches no further than those
(--model.window).

Not a pure Transformer, and no other program reads it: it is always named.
"""

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
from quire.layers.matches import Matches
from quire.layers.ngram_embedding import NgramCache, NgramEmbedding
from quire.models.modern import Modern, ModernSettings

FEWEST, MOST = 1 << 10, 1 << 17  # rows of an order's table, where nothing else is said
TOKENS_A_ROW = 8  # of the training text, about: the row count is the power of two above
TINY = 1e-30  # the least probability there is a logarithm of
MOST_COUNTED = 1 << 21  # tokens of the training text, the last ones: two or three seconds and some 40 MB of counts


@dataclass(frozen=True)
class NgramSettings(ModernSettings):
    """A modern decoder, and which n-grams it looks up, counts and finds again."""

    ngram_orders: tuple[int, ...] = (2, 3, 4, 5, 6)  # the last so many tokens have a table each; none: no tables
    ngram_rows: int = 0  # rows of each order's table; when training, 0 becomes a number that suits the text's length
    ngram_dropout: float = 0.0  # share of the looked-up vectors that are left out while training
    count_order: int = 8  # n-grams of up to so many tokens are counted in the training text; 0: none
    count_share: float = 0.6  # of what network and counts predict, the share that comes from the counts
    match_length: int = 6  # an earlier place where so many tokens were the same has half a vote; 0: none has

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
        if not 0 <= self.match_length <= 64:
            raise UserError(f"--model.match-length must be between 0 and 64, not {self.match_length}.")

    def sized(self, tokens: int) -> "NgramSettings":
        rows = 1 << max(0, tokens // TOKENS_A_ROW - 1).bit_length()
        return replace(self, ngram_rows=self.ngram_rows or min(max(rows, FEWEST), MOST))

    def count(self, tokens: np.ndarray | TokenStream) -> KneserNey | None:
        order = min(self.count_order, len(tokens))
        last = tokens[max(0, len(tokens) - MOST_COUNTED) :]
        return KneserNey.count(last, self.vocabulary_size, order) if order else None


class Ngram(Modern):
    """A modern decoder whose input is a token's vector and those of the n-grams that it ends; in evaluation mode, what
    it predicts is mixed with counts and matches."""

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
        """As Decoder.forward; in evaluation mode logarithms of the mixed probabilities (B, T, V), or their loss.

        A recorded loss, and so every gradient, is the network's alone.
        """
        if self.training or self.tape is not None or (self.counts is None and not self.settings.match_length):
            return super().forward(tokens, targets, cache, mask)
        logits = super().forward(tokens, None, cache, mask)
        network = F.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if isinstance(cache, NgramCache):
            tokens, mask = cache.tokens[:, : cache.length], cache.mask
        known = tokens if mask is None else tokens.masked_fill(~mask, -1)
        if targets is None:
            return self.mixed(network, known).clamp(min=TINY).log()
        wanted = targets.clamp(min=0)
        mixed = self.mixed(network.gather(-1, wanted.unsqueeze(-1)).squeeze(-1), known, wanted)
        counting = targets != IGNORED
        return -(mixed.clamp(min=TINY).log() * counting).sum() / counting.sum().clamp(min=1)

    def mixed(self, p: Tensor, known: Tensor, targets: Tensor | None = None) -> Tensor:
        """What network, counts and window say together after the last T of `known` (B, S), -1 being padding.

        `p` is what the network says, of each of `targets` (B, T), or of every token (B, T, V).
        """
        settings, new, counts = self.settings, p.shape[1], self.counts
        if counts is not None:
            recent = known[:, -(new + len(counts.orders)) :].to(counts.device)
            if targets is None:
                counted = counts.distribution(recent, new)
            else:
                counted = counts.probability(recent, targets.to(counts.device))
            p = (1 - settings.count_share) * p + settings.count_share * counted.to(p.dtype).to(p.device)
        if settings.match_length:
            begins = settings.document_begins(known, None)
            matches = Matches.find(known, new, settings.match_length, None if begins is None else begins.cumsum(1))
            if targets is None:
                return (p + matches.of_each(settings.vocabulary_size)) / (1 + matches.all().unsqueeze(-1))
            return (p + matches.of(targets)) / (1 + matches.all())
        return p

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
