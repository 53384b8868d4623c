"""Writing: text after a prompt, whole or piece by piece."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from quire.devices import choose_device
from quire.errors import UserError
from quire.generation.sampling import SamplingSettings, sample
from quire.generation.stream import tokens
from quire.run import Run
from quire.tokenizers.tokenizer import Unknown


@dataclass(frozen=True)
class GenerationSettings(SamplingSettings):
    """How text is written."""

    tokens: int = 300  # at most, for each sample
    samples: int = 1  # texts written at once, each with its own random numbers
    seed: int = 1337  # of the random numbers
    stop: tuple[str, ...] = ()  # end before the first of these strings
    unknown: Unknown = "error"  # prompt characters outside the vocabulary: refuse, skip or replace them
    special: Literal["text", "token"] = "text"  # <|name|> in a prompt: plain text, or the special token of that name

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"--seed must be at least 0 and below 2^63, not {self.seed}.")
        if "" in self.stop:
            raise UserError("--stop must not be empty.")


@dataclass
class Sample:
    """One written text, without its prompt; `stopped_by` says what ended it."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stopped_by: Literal["length", "stop", "separator"] = "length"


def generate(run: Run | str, prompt: str = "", *, device: str = "auto", **settings: Any) -> list[Sample]:
    """Texts that a run's model writes after `prompt`; `settings` are the fields of GenerationSettings.

    >>> quire.generate("runs/shakespeare", prompt="ROMEO:", tokens=200)[0].text  # doctest: +SKIP
    """
    return Writer(run if isinstance(run, Run) else Run(run), device).write([prompt], GenerationSettings(**settings))


class Writer:
    """A run's model, loaded, ready to write after any number of prompts."""

    def __init__(self, run: Run, device: str | torch.device = "auto", model: Any = None) -> None:
        self.device = choose_device(device) if isinstance(device, str) else device
        self.tokenizer = run.tokenizer
        self.start = run.start_token()
        # No special token is ever written but the separator, and that only where training had it as a target.
        trained = {self.tokenizer.separator} if run.manifest["separators"] > 1 else set()
        self.never = sorted(self.tokenizer.reserved() - trained)
        self.model = model if model is not None else run.model(self.device)

    def write(self, prompts: Sequence[str], settings: GenerationSettings) -> list[Sample]:
        """`settings.samples` texts for each prompt, all as one batch."""
        samples: list[Sample] = []
        for _ in self.steps(prompts, settings, samples):
            pass
        return samples

    def pieces(self, prompt: str, settings: GenerationSettings) -> Iterator[str]:
        """One text as it is written; a piece is shown once it cannot be the beginning of a stop string."""
        samples: list[Sample] = []
        shown = 0
        for _ in self.steps([prompt], settings, samples):
            safe = len(samples[0].text) - _half_stop(samples[0].text, settings.stop)
            if safe > shown:
                yield samples[0].text[shown:safe]
                shown = safe
        if samples[0].text[shown:]:
            yield samples[0].text[shown:]

    def steps(self, prompts: Sequence[str], settings: GenerationSettings, samples: list[Sample]) -> Iterator[None]:
        """Fill `samples` one token at a time, until each is complete."""
        starts = [
            self.tokenizer.encode(prompt, settings.unknown, settings.special) or [self.start] for prompt in prompts
        ]
        starts = [start for start in starts for _ in range(settings.samples)]
        samples.extend(Sample() for _ in starts)
        generators = [torch.Generator().manual_seed(settings.seed + i % settings.samples) for i in range(len(starts))]
        decoders = [self.tokenizer.decoder(start) for start in starts]
        running = set(range(len(starts)))

        def choose(logits: torch.Tensor, windows: list[list[int]]) -> list[int]:
            logits[:, self.never] = -torch.inf
            return [
                sample(row, window, settings, g) for row, window, g in zip(logits, windows, generators, strict=True)
            ]

        for chosen in tokens(self.model, starts, choose, self.device):
            for row in sorted(running):
                written = samples[row]
                if chosen[row] == self.tokenizer.separator:
                    written.stopped_by = "separator"
                    running.remove(row)
                    continue
                written.tokens.append(chosen[row])
                written.text += decoders[row].push(chosen[row])
                if (cut := _first_stop(written.text, settings.stop)) is not None:
                    written.text, written.stopped_by = written.text[:cut], "stop"
                    running.remove(row)
                elif len(written.tokens) == settings.tokens:
                    running.remove(row)
            yield
            if not running:
                return


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def _half_stop(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)
