"""A text predicted by counting alone: an interpolated n-gram model with modified Kneser-Ney smoothing.

    p_n(w | h) = (max(c(h w) - D(c(h w)), 0) + g(h) p_(n-1)(w | h')) / c(h),     h' is h without its first token

for a token w after the tokens h (Kneser and Ney 1995; Chen and Goodman 1999, section 3). c are counts at the highest
order; below it, they are continuation counts: how many different tokens stand before (h w). D takes one of three
values, for counts of 1, 2 and more; g(h) is all that D took from what follows h; p_0 is 1 / V.

The n-grams of an order are numbered, sorted by their context (the number of the (n-1)-gram that they begin with) and
then by their last token: a number is found by bisection, and all that may follow a context stands in one piece.

B batch, S tokens, T predictions, V vocabulary, G n-grams of an order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COUNTS_OF_COUNTS = 4  # how many n-grams were seen once, twice, three times, four times: the discounts follow
FALLBACK = 0.5  # the discount where any of them is zero, as for the characters of a long text


@dataclass(frozen=True)
class Order:
    """The n-grams of one order: `keys` (G), sorted, are context x V + token; `counts` (G) how often each was seen.

    The tensors below have one entry more, the last, so that the index -1 finds what holds of all that was never seen.
    """

    keys: Tensor
    counts: Tensor
    own: Tensor  # (G + 1,): max(c(h w) - D, 0) / c(h) of each n-gram
    weight: Tensor  # g(h) / c(h) of each context: what the order below counts for
    starts: Tensor  # the number of each context's first n-gram
    sizes: Tensor  # how many n-grams each context begins

    @classmethod
    def of(cls, keys: Tensor, counts: Tensor, contexts: int, vocabulary_size: int) -> "Order":
        """The n-grams of these keys and counts; `contexts` is how many (n-1)-grams there are."""
        taken = discounts(counts)[counts.clamp(max=3)]
        context = keys // vocabulary_size
        total, handed_on = torch.zeros(2, contexts + 1, dtype=torch.float64, device=keys.device).index_add_(
            1, context, torch.stack([counts.double(), taken])
        )
        weight = torch.where(total > 0, handed_on / total.clamp(min=1), 1.0)
        own = torch.nn.functional.pad((counts - taken) / total.clamp(min=1)[context], (0, 1))
        sizes = torch.bincount(context, minlength=contexts + 1)
        return cls(keys, counts, own, weight, sizes.cumsum(0) - sizes, sizes)

    def find(self, contexts: Tensor, tokens: Tensor, vocabulary_size: int) -> Tensor:
        """The number of the n-gram of a context and a token, any shape; -1 where there is none."""
        wanted = contexts * vocabulary_size + tokens
        place = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
        there = (self.keys.take(place) == wanted) & (contexts >= 0) & (tokens >= 0)
        return place.masked_fill_(~there, -1)


class KneserNey:
    """n-grams of up to as many tokens as there are `orders`, counted once; they learn nothing by gradients.

    Probabilities are float64. Where a `separator` is set, what follows it is predicted from nothing before it.
    """

    def __init__(self, vocabulary_size: int, orders: Sequence[Order], separator: int | None = None) -> None:
        self.vocabulary_size, self.orders, self.separator = vocabulary_size, list(orders), separator

    @classmethod
    def count(cls, tokens: np.ndarray, vocabulary_size: int, order: int) -> "KneserNey":
        """Count `tokens`, at least `order` of ids below `vocabulary_size`: a million take about a second at order 8."""
        return cls._of(list(_counted(tokens, vocabulary_size, order)), vocabulary_size)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.orders[0].keys.device

    @classmethod
    def _of(cls, grams: "list[Grams]", vocabulary_size: int) -> "KneserNey":
        """The model of these orders: how often the longest n-grams occur, and how the shorter ones are continued."""
        counts = [each.continued for each in grams[:-1]] + [grams[-1].counts]
        named = _named([(each.keys, own) for each, own in zip(grams, counts, strict=True)])
        return cls.from_tables(dict(named), vocabulary_size)

    def tables(self) -> dict[str, Tensor]:
        """What it was counted from, by name: keys (int64) and counts (int32) of each order."""
        return dict(_named([(order.keys.numpy(), order.counts.numpy()) for order in self.orders]))

    @classmethod
    def from_tables(
        cls,
        tables: dict[str, Tensor],
        vocabulary_size: int,
        device: torch.device | str = "cpu",
        separator: int | None = None,
    ) -> "KneserNey":
        """The inverse of `tables`."""
        orders: list[Order] = []
        for n in range(1, len(tables) // 2 + 1):
            keys, counts = tables[f"keys.{n}"].to(device), tables[f"counts.{n}"].to(device)
            orders.append(Order.of(keys, counts, len(orders[-1].keys) if orders else 1, vocabulary_size))
        return cls(vocabulary_size, orders, separator)

    def contexts(self, tokens: Tensor, new: int) -> Iterator[tuple[Order, Tensor]]:
        """Each order, and the number of the context that it predicts from at the last `new` of `tokens` (B, S): (B, T).

        -1 is a context that was never seen; so is one with a token of -1 in it, or before the first. Orders for which
        no context was seen are left out.
        """
        begin = torch.zeros_like(tokens)  # the number of the gram that begins at each place, here the empty one
        later = tokens if self.separator is None else tokens.masked_fill(tokens == self.separator, -1)
        for n, order in enumerate(self.orders):  # the context has n tokens, the last of them the one asked for
            ending = begin[:, -new:]
            if n and not bool((ending >= 0).any()):
                return
            yield order, torch.nn.functional.pad(ending, (new - ending.shape[1], 0), value=-1)
            begin = order.find(begin[:, : tokens.shape[1] - n], (later if n else tokens)[:, n:], self.vocabulary_size)

    def probability(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """p of each of `targets` (B, T) after the last T of `tokens` (B, S): (B, T)."""
        p = torch.full(targets.shape, 1 / self.vocabulary_size, dtype=torch.float64, device=tokens.device)
        for order, context in self.contexts(tokens, targets.shape[1]):
            found = order.find(context, targets, self.vocabulary_size)
            p = order.weight.take(context) * p + order.own.take(found)
        return p

    def distribution(self, tokens: Tensor, new: int) -> Tensor:
        """p of every token after each of the last `new` of `tokens` (B, S): (B, T, V)."""
        rows, V = tokens.shape[0] * new, self.vocabulary_size
        p = torch.full((rows, V), 1 / V, dtype=torch.float64, device=tokens.device)
        for order, contexts in self.contexts(tokens, new):
            context = contexts.reshape(-1)
            sizes = order.sizes.take(context)
            row = torch.repeat_interleave(sizes)
            first = order.starts.take(context) - sizes.cumsum(0) + sizes
            number = torch.arange(len(row), device=tokens.device) + first.take(row)
            p *= order.weight.take(context).unsqueeze(1)
            p.put_(row * V + order.keys.take(number) % V, order.own.take(number), accumulate=True)
        return p.view(tokens.shape[0], new, V)


def discounts(counts: Tensor) -> Tensor:
    """What is taken from a count of 0 (nothing), 1, 2 and more: (4,), float64 (Chen and Goodman 1999, equation 26)."""
    found = torch.bincount(counts[counts <= COUNTS_OF_COUNTS], minlength=COUNTS_OF_COUNTS + 1).tolist()
    result = [0.0, FALLBACK, FALLBACK, FALLBACK]
    if all(found[1:]):
        share = found[1] / (found[1] + 2 * found[2])  # below: nothing is left whole, and nothing taken away
        result[1:] = [min(max(k - (k + 1) * share * found[k + 1] / found[k], 0.05), k - 0.05) for k in (1, 2, 3)]
    return torch.tensor(result, dtype=torch.float64, device=counts.device)


def kneser_ney(training: np.ndarray, held_out: np.ndarray, vocabulary_size: int, order: int) -> np.ndarray:
    """Nats per token of `held_out` after counting `training`, for the models of the orders 1 to `order`: (order,).

    Every token of `held_out` is predicted from those before it, the first ones from the end of `training`.
    """
    tokens = torch.from_numpy(np.concatenate([training[-order:], held_out]).astype(np.int64)).unsqueeze(0)
    grams = list(_counted(training, vocabulary_size, order))
    models = (KneserNey._of(grams[:n], vocabulary_size) for n in range(1, order + 1))
    return np.array([-float(each.probability(tokens[:, :-1], tokens[:, order:]).log().mean()) for each in models])


@dataclass
class Grams:
    """The n-grams of one order: their keys, how often each occurs, and how many different tokens stand before it (of
    the longest that were counted: not known)."""

    keys: np.ndarray
    counts: np.ndarray
    continued: np.ndarray


def _counted(tokens: np.ndarray, vocabulary_size: int, order: int) -> Iterator[Grams]:
    """The n-grams of each order; of one after the other the continuations are known when the next one is."""
    assert len(tokens) >= order, "there is something to count"
    tokens = np.asarray(tokens, dtype=np.int64)
    numbers = np.zeros(len(tokens), dtype=np.int64)  # of the n-gram that begins at each place: first the empty one's
    shorter: Grams | None = None
    for n in range(1, order + 1):
        pairs = numbers[: len(tokens) - n + 1] * vocabulary_size + tokens[n - 1 :]
        keys, first, longer, counts = _distinct(pairs)
        if shorter is not None:  # each different n-gram is one continuation of the (n-1)-gram that it ends with
            shorter.continued = np.bincount(numbers[first + 1], minlength=len(shorter.keys))
            yield shorter
        shorter, numbers = Grams(keys, counts, np.empty(0, dtype=np.int64)), longer
    assert shorter is not None
    yield shorter


def _distinct(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Different values in order, a place of each, which of them stands at each place, and how often each occurs.

    numpy.unique does the same; sorting a value and its place as one number is several times as fast.
    """
    bits = len(values).bit_length()
    assert int(values.max()).bit_length() + bits < 64, "a value and its place fit one number"
    packed = np.sort(values << bits | np.arange(len(values)))
    places, ordered = packed & ((1 << bits) - 1), packed >> bits
    new = np.diff(ordered, prepend=-1) != 0
    starts = np.flatnonzero(new)
    which = np.empty_like(places)
    which[places] = np.cumsum(new) - 1
    return ordered[starts], places[starts], which, np.diff(starts, append=len(values))


def _named(orders: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[str, Tensor]]:
    for n, (keys, counts) in enumerate(orders, 1):
        yield f"keys.{n}", torch.from_numpy(keys)
        yield f"counts.{n}", torch.from_numpy(counts.astype(np.int32))
