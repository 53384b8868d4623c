"""Beam search: not one draw but the likeliest whole texts that a search of a given width finds.

Every prompt has up to K beams, unfinished texts. Each step writes every beam on by every token, and keeps the K
likeliest that have not ended. A text that ended among the K likeliest of its step is a result, with the score

    log p(text) / length ** alpha,        length in tokens, its separator counted

as in transformers; Wu et al. 2016 (section 7, equation 14) divide by ((5 + length) / 6) ** alpha instead. With alpha 0
the likeliest text wins, which is often a short one; with alpha 1 it is the likeliest on average over its tokens.
K beams, V vocabulary, B rows: the beams of all prompts, one prompt's behind another's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.generation.texts import StoppedBy


@dataclass(frozen=True)
class Beam:
    """A text in the making: its tokens, and the sum of their log-probabilities."""

    tokens: tuple[int, ...] = ()
    log_probability: float = 0.0


@dataclass(frozen=True)
class Result:
    """A text that has ended; `tokens` have the separator that ended it, `score` is normalized by the length."""

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    stopped_by: StoppedBy


class BeamSearch:
    """A search for each of several prompts at once; its `choose` drives `stream.tokens`, one row a prompt at first.

    `ended` says what ends a text of these tokens, if anything; `length` is the most tokens a text may have; `never` are
    tokens that are not written. `results` are each prompt's best `count` texts, best first. A search ends early only
    where no beam could still become one of them: log-probabilities only fall, and a text is at most `length` long.
    """

    def __init__(
        self,
        prompts: int,
        beams: int,
        count: int,
        length: int,
        length_penalty: float,
        ended: Callable[[Sequence[int]], StoppedBy | None],
        never: Sequence[int] = (),
    ) -> None:
        self.beams, self.count, self.length, self.length_penalty = beams, count, length, length_penalty
        self.ended, self.never = ended, list(never)
        self.running: dict[int, list[Beam]] = {prompt: [Beam()] for prompt in range(prompts)}
        self.results: list[list[Result]] = [[] for _ in range(prompts)]

    def choose(self, logits: Tensor, windows: list[list[int]]) -> tuple[list[int], list[int]]:
        """One step of every search: which rows of `logits` (B, V) go on, and with which tokens."""
        steps = torch.log_softmax(logits.double(), -1)
        steps[:, self.never] = -math.inf
        rows, chosen, first = [], [], 0
        for prompt, beams in list(self.running.items()):
            sums = torch.tensor([beam.log_probability for beam in beams], dtype=torch.float64)
            going_on = self._step(prompt, sums[:, None] + steps[first : first + len(beams)])
            self.running[prompt] = [beam for _, beam in going_on]
            if self._decided(prompt):
                del self.running[prompt]
            else:
                rows += [first + row for row, _ in going_on]
                chosen += [beam.tokens[-1] for _, beam in going_on]
            first += len(beams)
        return rows, chosen

    def _step(self, prompt: int, sums: Tensor) -> list[tuple[int, Beam]]:
        """The K likeliest beams that go on, with the rows they come from; `sums` (K, V) are all log-probabilities."""
        going_on: list[tuple[int, Beam]] = []
        for rank, (log_probability, row, token) in enumerate(_likeliest(sums, 2 * self.beams)):
            tokens = (*self.running[prompt][row].tokens, token)
            end = self.ended(tokens) or ("length" if len(tokens) == self.length else None)
            if end is None:
                going_on.append((row, Beam(tokens, log_probability)))
            elif rank < self.beams:
                score = log_probability / len(tokens) ** self.length_penalty
                results = [*self.results[prompt], Result(tokens, log_probability, score, end)]
                self.results[prompt] = sorted(results, key=lambda result: -result.score)[: self.count]
            if len(going_on) == self.beams or (len(tokens) == self.length and rank + 1 >= self.beams):
                break
        return going_on

    def _decided(self, prompt: int) -> bool:
        """Whether no beam of this prompt could still become one of its results."""
        beams, results = self.running[prompt], self.results[prompt]
        if not beams or len(results) < self.count:
            return not beams
        return beams[0].log_probability / self.length**self.length_penalty <= results[-1].score


def _likeliest(sums: Tensor, count: int) -> Iterator[tuple[float, int, int]]:
    """(log-probability, row, token) from the largest of `sums` (K, V) down; the first `count` come cheaply."""
    flat = sums.flatten()
    best = flat.topk(min(count, len(flat)))
    yield from _possible(best.values, best.indices, sums.shape[1])
    rest = flat.index_fill(0, best.indices, -math.inf).sort(descending=True)
    yield from _possible(rest.values, rest.indices, sums.shape[1])


def _possible(values: Tensor, places: Tensor, vocabulary: int) -> Iterator[tuple[float, int, int]]:
    """Values in order with the row and token of each place; what has no probability is left out."""
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value > -math.inf:
            yield value, *divmod(place, vocabulary)
