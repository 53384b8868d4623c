"""A curriculum: stages of training, each with a context length and a text of its own.

Short contexts first are cheap steps while there is only spelling to learn; a text of its own for the last stage is
what the model remembers best. A step takes about as many tokens in every stage: where windows are half as long, there
are twice as many of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quire.data.batches import Batches
from quire.data.pairs import Examples, Pairs
from quire.data.shards import TokenStream
from quire.errors import UserError, nearest

FORM = "SHARE:CONTEXT or SHARE:CONTEXT:TEXT, such as 0.5:64"
SHORTEST = 2  # tokens of context, as for a model
ROUNDING = 1e-9  # by which a progress that was added up may miss a boundary


@dataclass(frozen=True)
class Stage:
    """A part of the run; `share` is relative to those of the other stages, `context_length` 0 is the model's."""

    share: float
    context_length: int = 0
    text: str = ""  # the TEXT argument from which it takes its tokens; "": all of them

    @classmethod
    def parse(cls, word: str) -> "Stage":
        """From SHARE:CONTEXT or SHARE:CONTEXT:TEXT; an empty CONTEXT is the model's."""
        share, colon, rest = word.partition(":")
        context, _, text = rest.partition(":")
        if not colon:
            raise UserError(f"--curriculum {word!r} is no stage: write {FORM}. TEXT stands before the flags.")
        try:
            part = float(share)
        except ValueError:
            part = math.nan
        if not 0 < part < math.inf:
            raise UserError(f"--curriculum {word!r}: the share {share!r} must be a number above 0, as in 0.5:64.")
        try:
            length = int(context or 0)
        except ValueError:
            raise UserError(
                f"--curriculum {word!r}: the context {context!r} is no whole number: write {FORM}."
            ) from None
        if length != 0 and length < SHORTEST:
            raise UserError(
                f"--curriculum {word!r}: the context must be at least {SHORTEST} tokens, or 0 for the model's."
            )
        return cls(part, length, text)


class Curriculum:
    """The stages of a run and the batches of each; without any stage given, one of everything."""

    def __init__(
        self,
        words: Sequence[str],
        tokens: Examples,
        context_length: int,
        seed: int,
        ranges: Mapping[str, Sequence[int]],
    ) -> None:
        """`ranges` says for each TEXT argument where its tokens lie, [start, end). Pairs have no stages."""
        self.context_length = context_length
        self.stages = [Stage.parse(word) for word in words] or [Stage(1.0)]
        total = math.fsum(stage.share for stage in self.stages)
        self.ends = np.cumsum([stage.share / total for stage in self.stages])  # progress at which each stage ends
        self.batches: list[Batches | Pairs] = []
        if isinstance(tokens, Pairs):
            if words:
                raise UserError("--curriculum cuts a text into windows, and pairs are taken whole. Leave it out.")
            self.whole: Batches | Pairs = tokens
            self.batches.append(tokens)
            return
        self.whole = Batches(tokens, context_length, seed)  # all there is, in windows of the model's context
        for number, stage in enumerate(self.stages):
            length = stage.context_length or context_length
            if length > context_length:
                raise UserError(
                    f"Stage {number + 1} of --curriculum has a context of {length} tokens, more than the model's"
                    f" {context_length}. Shorten it, or give a longer --model.context-length."
                )
            part = _span(tokens, *_range(stage.text, ranges)) if stage.text else tokens
            if len(part) <= length and words:
                raise UserError(
                    f"Stage {number + 1} of --curriculum: {stage.text or 'the text'} has {max(len(part) - 1, 0)} tokens"
                    f" to train on (what is held out is not among them), fewer than one window of {length}."
                    " Shorten the context, or give more text."
                )
            self.batches.append(Batches(part, length, stage_seed(seed, number)))

    def stage_at(self, progress: float) -> int:
        """The number, from 0, of the stage in which a run with that progress is."""
        passed = int(np.searchsorted(self.ends, progress + ROUNDING, side="right"))
        return min(passed, len(self.stages) - 1)

    def rows(self, number: int, batch_size: int) -> int:
        """Windows in a batch of that stage, where a batch of the model's context has `batch_size`."""
        return batch_size * self.context_length // self.batches[number].context_length

    def sentence(self, number: int) -> str:
        """What that stage is, for a person."""
        source = f", from {self.stages[number].text}" if self.stages[number].text else ""
        length = self.batches[number].context_length
        return f"Stage {number + 1} of {len(self.stages)}: windows of {length} tokens{source}."


def shortened(words: Sequence[str], context_length: int) -> tuple[str, ...]:
    """The stages with contexts of at most that many tokens."""
    stages = [Stage.parse(word) for word in words]
    return tuple(f"{each.share:g}:{min(each.context_length, context_length)}" + ":" * bool(each.text) + each.text
                 for each in stages)  # fmt: skip


def stage_seed(seed: int, number: int) -> int:
    """The seed of a stage's order; the first stage has the run's own, as a run without stages has."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) if number else seed


def _span(tokens: np.ndarray | TokenStream, start: int, stop: int) -> np.ndarray | TokenStream:
    return tokens.span(start, stop) if isinstance(tokens, TokenStream) else tokens[start:stop]


def _range(text: str, ranges: Mapping[str, Sequence[int]]) -> Sequence[int]:
    if text not in ranges:
        raise UserError(
            f"--curriculum names the text {text!r}, which is not among those to train on.{nearest(text, list(ranges))}"
            f" Name one of: {', '.join(ranges)}."
        )
    return ranges[text]
