"""A text predicted by counting alone: the baseline that a trained model must beat, and a measure of the text.

An interpolated n-gram model with modified Kneser-Ney smoothing (Kneser and Ney 1995; Chen and Goodman 1999, section 3):

    p_n(w | h) = max(c(h w) - D(c(h w)), 0) / c(h) + g(h) p_(n-1)(w | h'),     h' is h without its first token

c are counts at the highest order; below it, they are continuation counts: how many different tokens stand before
(h w). D takes one of three values, for counts of 1, 2 and more; g(h) hands on what D took away; p_0 is 1 / V.

Training and held-out tokens are numbered together, order by order, so that no table is ever looked up: the n-gram that
begins at a place is the pair of the (n-1)-gram that begins there and the token after it.
"""

from dataclasses import dataclass

import numpy as np

COUNTS_OF_COUNTS = 4  # how many n-grams were seen once, twice, three times, four times: the discounts follow
FEW = 0.5  # the discount where those are none, as for the characters of a long text


@dataclass(frozen=True)
class Grams:
    """The n-grams of one order: the number of the one that begins at each place (T,), and of each number the places
    of its first occurrence; `contexts` are the numbers of the (n-1)-grams that they begin with."""

    order: int
    numbers: np.ndarray
    first: np.ndarray
    contexts: np.ndarray

    @classmethod
    def longer(cls, shorter: "Grams | None", tokens: np.ndarray, vocabulary_size: int) -> "Grams":
        """Those one token longer than `shorter`; None: single tokens."""
        order = shorter.order + 1 if shorter is not None else 1
        before = shorter.numbers[: len(tokens) - order + 1] if shorter is not None else np.zeros(len(tokens), np.int64)
        pairs = before * vocabulary_size + tokens[order - 1 :]
        _, first, numbers = np.unique(pairs, return_index=True, return_inverse=True)
        return cls(order, numbers, first, before[first])


def kneser_ney(training: np.ndarray, held_out: np.ndarray, vocabulary_size: int, order: int) -> np.ndarray:
    """Nats per token of `held_out` after counting `training`, at the orders 1 to `order`: (order,).

    Both are token ids below `vocabulary_size`, at least `order` of each; every token of `held_out` is predicted from
    the order - 1 before it, the first ones from the end of `training`. Time and memory are in proportion to order and
    length: a million characters take about a second at order 8.
    """
    assert len(training) >= order and len(held_out) > 0, "there is something to count, and something to predict"
    tokens = np.concatenate([training, held_out]).astype(np.int64)
    learned, losses = len(training), np.empty(order)
    lower = np.full(len(held_out), 1.0 / vocabulary_size)  # p_(n-1) of continuation counts, of each held-out token
    shorter: Grams | None = None
    for n in range(1, order + 1):
        grams = Grams.longer(shorter, tokens, vocabulary_size)
        counts = np.bincount(grams.numbers[: learned - n + 1], minlength=len(grams.first))
        if shorter is not None:
            seen = grams.first[grams.first + n <= learned]  # one place of each n-gram of the training tokens
            continued = np.bincount(shorter.numbers[seen + 1], minlength=len(shorter.first))
            lower = interpolated(shorter, continued, lower, learned)
        losses[n - 1] = -np.log(interpolated(grams, counts, lower, learned)).mean()
        shorter = grams
    return losses


def interpolated(grams: Grams, counts: np.ndarray, lower: np.ndarray, learned: int) -> np.ndarray:
    """p_n of each held-out token: the n-grams' discounted `counts`, mixed with the `lower` order's probabilities."""
    taken = discounts(counts)[np.minimum(counts, 3)]
    size = int(grams.contexts.max()) + 1
    total = np.bincount(grams.contexts, counts, size)
    handed_on = np.bincount(grams.contexts, taken, size)  # what the discounts took away, by context
    numbers = grams.numbers[learned - grams.order + 1 :]  # of the n-gram that each held-out token ends
    contexts = grams.contexts[numbers]
    seen = np.maximum(total[contexts], 1)
    mixed = (counts[numbers] - taken[numbers] + handed_on[contexts] * lower) / seen
    return np.where(total[contexts] > 0, mixed, lower)


def discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from a count of 0 (nothing), 1, 2 and more: (4,) (Chen and Goodman 1999, equation 26)."""
    found = np.bincount(counts[counts <= COUNTS_OF_COUNTS], minlength=COUNTS_OF_COUNTS + 1)
    result = np.array([0.0, FEW, FEW, FEW])
    if found[1:].all():
        share = found[1] / (found[1] + 2 * found[2])
        for k in (1, 2, 3):
            result[k] = np.clip(k - (k + 1) * share * found[k + 1] / found[k], 0.05, k - 0.05)
    return result
