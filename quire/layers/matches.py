"""What stood in the window already: earlier places that read the same vote for what came next there.

    p(w | h) = (p_0(w | h) + sum_j v_j [x_j = w]) / (1 + sum_j v_j),     v_j = s(m_j) / max(1, sum_i s(m_i)),
    s(m) = 1 / (1 + e^(L - m))

over the earlier places j of the window; m_j says how many tokens right before j equal those right before the
prediction (2 L at most are compared). p_0 is what everything else says, and has one vote. A place has half a vote at
m = L, and none below m = L / 2: by chance, texts agree that far anywhere. Where there are more votes than one, each
counts for less, so that they have one together: a phrase that came back ten times is no surer than one that came back
twice, and who writes does not repeat it for ever.

Names, phrases and lines of code come back within a page, and a network of a few minutes has not learned to copy them.

A cache model (Kuhn and De Mori 1990) of long contexts, kin to the match model of the compressor PAQ (Mahoney 2005). In
attention's words: queries and keys are the last tokens, values are what came next. Nothing in it is learned.

B batch, S tokens, T predictions, N pairs of a prediction and an earlier place that votes, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.layers.ngram_embedding import MULTIPLIER


@dataclass(frozen=True)
class Matches:
    """For the last T of S tokens: `rows` (N), which of the B x T predictions a place votes in; `tokens` (N), for what;
    `votes` (N), with how much weight, at most 1 together."""

    rows: Tensor
    tokens: Tensor
    votes: Tensor
    shape: tuple[int, int]  # B, T

    @classmethod
    def find(cls, tokens: Tensor, new: int, length: int, documents: Tensor | None = None) -> "Matches":
        """The votes at the last `new` of `tokens` (B, S), -1 being padding, where `length` is L.

        `documents` (B, S) numbers the document of each token, where one is not to know of another.
        """
        B, S = tokens.shape
        least, place = max(1, length // 2), torch.arange(S, device=tokens.device)
        hashed = _hashes(tokens, least)
        alike = hashed[:, -new:, None] == hashed[:, None, :]  # (B, T, S)
        row, last, other = (alike & (place < place[-new:, None])).nonzero(as_tuple=True)
        here, there = row * S + last + (S - new), row * S + other  # the token before the prediction, and before place j
        flat, segments = tokens.flatten(), (torch.zeros_like(tokens) if documents is None else documents).flatten()
        agreed, going = torch.zeros_like(row), torch.arange(len(row), device=tokens.device)
        for back in range(2 * length):
            going = going[other[going] >= back]
            ours, theirs = here[going], there[going] - back
            token = flat.take(ours - back)
            going = going[(token == flat.take(theirs)) & (token >= 0) & (segments.take(ours) == segments.take(theirs))]
            agreed[going] += 1
        kept = agreed >= least
        rows, votes = (row * new + last)[kept], torch.sigmoid(agreed[kept] - length)
        found = cls(rows, flat.take(there[kept] + 1), votes, (B, new))
        return replace(found, votes=found.votes / found.all().clamp(min=1).take(rows))

    def all(self) -> Tensor:
        """The sum of all votes at each prediction: (B, T)."""
        return self._summed(self.rows, self.votes)

    def of(self, targets: Tensor) -> Tensor:
        """The sum of the votes for each of `targets` (B, T)."""
        return self._summed(self.rows, self.votes * (self.tokens == targets.reshape(-1).take(self.rows)))

    def of_each(self, vocabulary_size: int) -> Tensor:
        """The sum of the votes for each token of the vocabulary: (B, T, V)."""
        B, T = self.shape
        votes = self.votes.new_zeros(B * T * vocabulary_size)
        votes.put_(self.rows * vocabulary_size + self.tokens, self.votes, accumulate=True)
        return votes.view(B, T, vocabulary_size)

    def _summed(self, rows: Tensor, votes: Tensor) -> Tensor:
        B, T = self.shape
        return votes.new_zeros(B * T).index_add_(0, rows, votes).view(B, T)


def _hashes(tokens: Tensor, length: int) -> Tensor:
    """A number for the last `length` tokens at each place, equal where those are; it wraps around, and may be equal
    elsewhere too."""
    hashed = torch.zeros_like(tokens)
    for back in range(length):
        hashed = hashed * MULTIPLIER + torch.nn.functional.pad(tokens, (back, 0), value=-1)[:, : tokens.shape[1]] + 2
    return hashed
