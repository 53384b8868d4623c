"""From logits to one token: small functions on one row of logits (V), composed in a fixed order.

A function that rules a token out sets its logit to -inf. To add one: a function, and a line in `sample`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.errors import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn."""

    temperature: float = 1.0  # below 1 likely tokens become likelier, above 1 less so; 0: always the likeliest
    top_k: int = 0  # draw among the K likeliest tokens; 0: all
    top_p: float = 1.0  # draw among the likeliest tokens that together have this probability
    min_p: float = 0.0  # draw among tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens already in the context, prompt and text, become less likely
    presence_penalty: float = 0.0  # taken off the logit of every token already written; the prompt does not count

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be a number of at least 0, not {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"--top-k must be at least 0, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p must be between 0 and 1, not {self.min_p}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition-penalty must be a finite number above 0, not {self.repetition_penalty}.")
        if not math.isfinite(self.presence_penalty):
            raise UserError(f"--presence-penalty must be a finite number, not {self.presence_penalty}.")


def sample(
    logits: Tensor,
    context: Sequence[int],
    settings: SamplingSettings,
    generator: torch.Generator,
    written: Sequence[int] = (),
) -> int:
    """The next token after `context`, drawn from `logits` (V) with `generator`, both on the CPU.

    `written` are those tokens that were drawn before, without the prompt's.
    """
    logits = penalize_repetition(logits, context, settings.repetition_penalty)
    logits = penalize_presence(logits, written, settings.presence_penalty)
    if settings.temperature == 0:
        return int(logits.argmax())
    logits = logits / settings.temperature
    logits = keep_top_k(logits, settings.top_k)
    logits = keep_top_p(logits, settings.top_p)
    logits = keep_min_p(logits, settings.min_p)
    return int(torch.multinomial(torch.softmax(logits, -1), 1, generator=generator))


def penalize_repetition(logits: Tensor, context: Sequence[int], penalty: float) -> Tensor:
    """Divide positive logits of tokens in the context by `penalty`, multiply negative ones (Keskar et al. 2019)."""
    if penalty == 1 or not context:
        return logits
    seen = torch.tensor(sorted(set(context)))
    score = logits[seen]
    return logits.index_put((seen,), torch.where(score > 0, score / penalty, score * penalty))


def penalize_presence(logits: Tensor, written: Sequence[int], penalty: float) -> Tensor:
    """Subtract `penalty` once from the logit of each token written so far (OpenAI's and vLLM's presence_penalty)."""
    if penalty == 0 or not written:
        return logits
    seen = torch.tensor(sorted(set(written)))
    return logits.index_put((seen,), logits[seen] - penalty)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k largest (and those equal to the k-th)."""
    if not 0 < k < len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020)."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)
    before = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)  # probability of all likelier ones
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, order, before >= p), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as probable as the likeliest (Nguyen et al. 2024)."""
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.max() + math.log(p), -math.inf)
