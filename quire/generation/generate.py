"""Writing: text after a prompt, whole or piece by piece, drawn or by beam search."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from quire.devices import choose_device
from quire.errors import UserError
from quire.generation.alternatives import expectations
from quire.generation.beams import BeamSearch
from quire.generation.fixed import fix
from quire.generation.reading import PromptMemory, Source
from quire.generation.sampling import SamplingSettings, sample
from quire.generation.stream import Choose, shortened, tokens
from quire.generation.texts import Draft, Sample, Score, StoppedBy, first_stop, half_stop
from quire.layers.fixed_linear import Weights
from quire.run import Run
from quire.tokenizers.tokenizer import Special, Unknown


@dataclass(frozen=True)
class GenerationSettings(SamplingSettings):
    """How text is written."""

    tokens: int = 300  # at most, for each sample
    samples: int = 1  # texts for each prompt, each with its own random numbers; with --beams the best ones
    seed: int = 1337  # of the random numbers
    stop: tuple[str, ...] = ()  # end before the first of these strings
    unknown: Unknown = "error"  # prompt characters outside the vocabulary: refuse, skip or replace them
    special: Special = "text"  # <|name|> in a prompt: plain text, an error, or the special token of that name ("token")
    beams: int = 1  # above 1: search for the likeliest texts with this many beams; nothing is drawn
    length_penalty: float = 1.0  # texts of a beam search rank by log-probability / length ^ this; 0: not by length
    batch_size: int = 64  # texts (or beams) that run at once; fewer take less memory

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "samples", "beams", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"--seed must be at least 0 and below 2^63, not {self.seed}.")
        if "" in self.stop:
            raise UserError("--stop must not be empty.")
        if not 0 <= self.length_penalty <= 10:
            raise UserError(f"--length-penalty must be between 0 and 10, not {self.length_penalty}.")
        if self.beams == 1:
            if self.length_penalty != 1:
                raise UserError("--length-penalty ranks the texts of a beam search. Give --beams too, at least 2.")
            return
        if self.samples > self.beams:
            raise UserError(f"--samples {self.samples} is more than the --beams {self.beams} that they come from.")
        for setting in fields(SamplingSettings):
            value, flag = getattr(self, setting.name), f"--{setting.name.replace('_', '-')}"
            if value != setting.default and not (flag == "--temperature" and value == 0):
                raise UserError(f"{flag} shapes a draw, and --beams draws nothing. Leave one of them out.")


def generate(
    run: Run | str, prompt: str = "", *, device: str = "auto", weights: Weights = "float32", **settings: Any
) -> list[Sample]:
    """Texts that a run's model writes after `prompt`; `settings` are the fields of GenerationSettings.

    `weights` "int8" rounds the weights for speed, on a CPU (layers/fixed_linear.py).

    >>> quire.generate("runs/shakespeare", prompt="ROMEO:", tokens=200)[0].text  # doctest: +SKIP
    """
    writer = Writer(run if isinstance(run, Run) else Run(run), device, weights=weights)
    return writer.write([prompt], GenerationSettings(**settings))


@dataclass(frozen=True)
class Start:
    """What a prompt becomes: the tokens that the model writes on from, and what its encoder reads, if it has one."""

    prompt: str
    window: tuple[int, ...]
    source: Source = None


class Writer:
    """A run's model, loaded, ready to write after any number of prompts.

    It remembers the prompts of its last call: what the next ones share with them is not read again. A `model` that is
    given stays as it is; one that is loaded is made ready to write, with `weights` as asked.
    """

    def __init__(
        self, run: Run, device: str | torch.device = "auto", model: Any = None, weights: Weights = "float32"
    ) -> None:
        self.device = choose_device(device) if isinstance(device, str) else device
        self.tokenizer = run.tokenizer
        self.start_token, self.prefix = run.start_token(), run.prompt_prefix()
        self.reads_source = run.settings.reads_source
        self.answers, self.never = run.pairs, run.never_written()
        self.model = model if model is not None else fix(run.model(self.device), weights)
        self.memory = PromptMemory()

    def start(self, prompt: str, unknown: Unknown = "error", special: Special = "text") -> Start:
        """The tokens of a prompt, in the form that this model was trained on."""
        ids, separator = self.tokenizer.encode(prompt, unknown, special), self.tokenizer.separator
        context_length = self.model.settings.context_length
        if not self.answers:  # a long text goes on from its end
            window = [*self.prefix, *ids] or [self.start_token]
            return Start(prompt, tuple(shortened(window, context_length, self.kept)))
        most = context_length if self.reads_source else context_length - 2  # beside the two separators
        if len(ids) > most:
            raise UserError(f"The prompt has {len(ids)} tokens, and this model reads at most {most}. Shorten it.")
        if self.reads_source:
            return Start(prompt, (separator,), tuple(ids) or (self.start_token,))
        return Start(prompt, (separator, *ids, separator))

    @property
    def kept(self) -> int:
        """How many tokens stay in front of a text that outgrows the context."""
        return 1 if self.answers else len(self.prefix)

    def write(self, prompts: Sequence[str], settings: GenerationSettings) -> list[Sample]:
        """`settings.samples` texts for each prompt, in batches of up to `settings.batch_size`."""
        samples: list[Sample] = []
        for _ in self.steps(prompts, settings, samples):
            pass
        return samples

    def pieces(self, prompt: str, settings: GenerationSettings) -> Iterator[str]:
        """One text as it is written; a piece is shown once it cannot be the beginning of a stop string."""
        samples: list[Sample] = []
        shown = 0
        for _ in self.steps([prompt], settings, samples):
            if not samples:  # a beam search has nothing to show before its end
                continue
            safe = len(samples[0].text) - half_stop(samples[0].text, settings.stop)
            if safe > shown:
                yield samples[0].text[shown:safe]
                shown = safe
        if samples[0].text[shown:]:
            yield samples[0].text[shown:]

    def steps(self, prompts: Sequence[str], settings: GenerationSettings, samples: list[Sample]) -> Iterator[None]:
        """Fill `samples` one token at a time, until each is complete; a beam search adds them at its end.

        A search may find fewer than `settings.samples` texts where there are no more.
        """
        if settings.beams > self.tokenizer.vocabulary_size:
            size = self.tokenizer.vocabulary_size
            raise UserError(f"--beams {settings.beams} is more than the vocabulary has tokens: at most {size}.")
        starts = [self.start(prompt, settings.unknown, settings.special) for prompt in prompts]
        if settings.beams > 1:
            together = max(1, settings.batch_size // settings.beams)
            for first in range(0, len(starts), together):
                yield from self._search(starts[first : first + together], samples, settings)
            return
        starts = [start for start in starts for _ in range(settings.samples)]
        begun = len(samples)
        samples.extend(Sample(prompt=start.prompt) for start in starts)
        for first in range(0, len(starts), settings.batch_size):
            numbers = range(first, min(first + settings.batch_size, len(starts)))
            seeds = [settings.seed + number % settings.samples for number in numbers]
            part = samples[begun + first : begun + first + len(seeds)]
            yield from self._draw([starts[number] for number in numbers], part, seeds, settings)

    def _draw(
        self, starts: Sequence[Start], samples: Sequence[Sample], seeds: Sequence[int], settings: GenerationSettings
    ) -> Iterator[None]:
        """Write each sample by drawing token after token, with random numbers of its own."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drafts = [
            Draft(sample, self.tokenizer, settings.stop, settings.tokens, after=start.window)
            for sample, start in zip(samples, starts, strict=True)
        ]
        running = list(range(len(samples)))  # which sample each row writes

        def choose(logits: Tensor, windows: list[list[int]]) -> tuple[list[int], list[int]]:
            logits[:, self.never] = -torch.inf
            rows, chosen = [], []
            for row, number in enumerate(running):
                written = samples[number].tokens
                token = sample(logits[row], windows[row], settings, generators[number], written)
                if drafts[number].add(token):
                    rows.append(row)
                    chosen.append(token)
            running[:] = [running[row] for row in rows]
            return rows, chosen

        for _ in self._stream(starts, choose):
            yield

    def _search(self, starts: Sequence[Start], samples: list[Sample], settings: GenerationSettings) -> Iterator[None]:
        """Add to `samples` the best `settings.samples` texts that a beam search finds for each start."""

        def ended(written: Sequence[int]) -> StoppedBy | None:
            if written[-1] == self.tokenizer.separator:
                return "separator"
            if settings.stop and first_stop(self.tokenizer.decode(written), settings.stop) is not None:
                return "stop"
            return None

        search = BeamSearch(
            len(starts),
            settings.beams,
            settings.samples,
            settings.tokens,
            settings.length_penalty,
            ended,
            self.never,
        )
        for _ in self._stream(starts, search.choose):
            yield
        found = [(start, result) for start, results in zip(starts, search.results, strict=True) for result in results]
        for start, result in found:
            written = Sample(prompt=start.prompt, score=Score(result.log_probability, result.score))
            draft = Draft(written, self.tokenizer, settings.stop, settings.tokens, after=start.window)
            for token in result.tokens:
                draft.add(token)
            samples.append(written)

    def _stream(self, starts: Sequence[Start], choose: Choose) -> Iterator[list[int]]:
        windows, sources = [start.window for start in starts], [start.source for start in starts]
        return tokens(self.model, windows, choose, self.device, sources=sources, kept=self.kept, memory=self.memory)

    def explain(self, written: Sample, unknown: Unknown = "error", special: Special = "text") -> None:
        """Add to a sample what the model expected in place of each token, of the prompt and of the text.

        The text is read once more, in the windows in which it was written. A prompt that is longer than the context
        counts by its end; an encoder's prompt has no expectations, for nothing predicts it.
        """
        start = self.start(written.prompt, unknown, special)
        expected = expectations(
            self.model,
            self.tokenizer,
            [*start.window, *written.tokens],
            self.device,
            start.source,
            self.kept,
        )
        own = len(start.window)
        written.prompt_expected, written.expected = expected[:own], expected[own:]
