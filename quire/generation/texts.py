"""A text as it comes to be: token by token, until something ends it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quire.generation.alternatives import Expectation
from quire.tokenizers import Tokenizer

StoppedBy = Literal["length", "stop", "separator"]


@dataclass(frozen=True)
class Score:
    """How likely a beam search found a text: the sum of its tokens' log-probabilities, and that sum for its length."""

    log_probability: float
    normalized: float


@dataclass
class Sample:
    """One written text, without the prompt that it was written for; `stopped_by` says what ended it.

    `score` is a beam search's. `expected` is what the model expected in place of each of `tokens`, where that was asked
    for, and `prompt_expected` the same for the tokens of the prompt.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stopped_by: StoppedBy = "length"
    prompt: str = field(default="", compare=False)
    score: Score | None = None
    prompt_expected: list[Expectation] | None = None
    expected: list[Expectation] | None = None

    def to_table(self) -> dict[str, Any]:
        """As plain JSON values: text, tokens and stopped_by, and what else was asked for."""
        table: dict[str, Any] = {"text": self.text, "tokens": self.tokens, "stopped_by": self.stopped_by}
        if self.score is not None:
            table["score"] = vars(self.score)
        if self.expected is not None and self.prompt_expected is not None:
            table |= {"logprobs": _logprobs(self.expected), "alternatives": _alternatives(self.expected)}
            table["prompt_tokens"] = [expectation.token for expectation in self.prompt_expected]
            table["prompt_logprobs"] = _logprobs(self.prompt_expected)
            table["prompt_alternatives"] = _alternatives(self.prompt_expected)
        return table


def _logprobs(expected: list[Expectation]) -> list[float | None]:
    return [expectation.log_probability for expectation in expected]


def _alternatives(expected: list[Expectation]) -> list[list[dict[str, Any]]]:
    return [[vars(alternative) for alternative in expectation.alternatives] for expectation in expected]


class Draft:
    """A sample that is being written `after` other tokens: what its own decode to, and where it ends."""

    def __init__(
        self, sample: Sample, tokenizer: Tokenizer, stop: Sequence[str], length: int, after: Sequence[int] = ()
    ) -> None:
        self.sample, self.stop, self.length = sample, stop, length
        self.separator, self.decoder = tokenizer.separator, tokenizer.decoder(after)

    def add(self, token: int) -> bool:
        """Take the next token; whether the text goes on."""
        sample = self.sample
        if token == self.separator:
            sample.stopped_by = "separator"
            return False
        sample.tokens.append(token)
        sample.text += self.decoder.push(token)
        if (cut := first_stop(sample.text, self.stop)) is not None:
            sample.text, sample.stopped_by = sample.text[:cut], "stop"
            return False
        return len(sample.tokens) < self.length


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins; None where there is none."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def half_stop(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)
