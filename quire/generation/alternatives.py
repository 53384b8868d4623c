"""What the model expected: the probability of each token of a text, and of the tokens it thought likelier.

All figures are of the model's own distribution, before temperature, penalties and cuts, and over the whole vocabulary.
T time, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.generation.reading import Source, source_argument
from quire.generation.stream import shortened
from quire.tokenizers import Tokenizer


@dataclass(frozen=True)
class Alternative:
    """A token that could have come, and the probability that the model gave it."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class Expectation:
    """A token that came, the natural logarithm of its probability, and the likeliest ones in its place.

    The first token of all has nothing before it: its probability is None, and it has no alternatives.
    """

    token: int
    text: str
    log_probability: float | None
    alternatives: list[Alternative]


def alternatives(logits: Tensor, tokenizer: Tokenizer, count: int = 5) -> list[list[Alternative]]:
    """The `count` likeliest next tokens at each of `logits` (T, V), likeliest first."""
    best = torch.softmax(logits.float(), -1).topk(min(count, logits.shape[-1]))
    return [
        [Alternative(token, tokenizer.name(token), p) for token, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@torch.no_grad()
def expectations(
    model: Any,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    device: torch.device,
    source: Source = None,
    kept: int = 0,
    count: int = 5,
) -> list[Expectation]:
    """What the model expected in place of each of `tokens`; `source` and `kept` as `stream.tokens` has them."""
    expected = [Expectation(tokens[0], tokenizer.name(tokens[0]), None, [])]
    for logits in _readings(model, tokens, device, source, kept):
        came = tokens[len(expected) : len(expected) + len(logits)]
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(came)[:, None])[:, 0].tolist()
        expected += [
            Expectation(token, tokenizer.name(token), log_probability, others)
            for token, log_probability, others in zip(came, chosen, alternatives(logits, tokenizer, count), strict=True)
        ]
    return expected


def _readings(model: Any, tokens: Sequence[int], device: torch.device, source: Source, kept: int) -> Iterator[Tensor]:
    """Logits (T, V) on the CPU of what follows tokens[0], tokens[1] ..., read in the windows of `stream.tokens`."""
    context_length, done, window = model.settings.context_length, 1, list(tokens[:1])
    while done < len(tokens):
        seen = [*window, *tokens[done : min(done + context_length - len(window), len(tokens) - 1)]]
        logits = model(torch.tensor([seen], device=device), **source_argument([source], device))[0, len(window) - 1 :]
        yield logits.cpu().float()
        done += len(logits)
        window = shortened([*seen, *tokens[done - 1 : done]], context_length // 2, kept)
