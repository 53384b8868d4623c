"""quire generate: let a run's model write."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from quire.cli.flags import RunPath, Switch, parse, print_json
from quire.errors import UserError
from quire.generation.generate import GenerationSettings, Writer
from quire.generation.texts import Sample
from quire.layers.fixed_linear import Weights
from quire.progress import bar, console, say
from quire.run import Run
from quire.tokenizers.tokenizer import visible

Prompt = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: ask, or from a pipe)")]
Stops = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class WritingSettings(GenerationSettings):
    """How text is written."""

    stop: Annotated[Stops, tyro.conf.arg(metavar="STR")] = ()  # end before this string; may be given several times


@dataclass(frozen=True)
class Arguments:
    """Write text after a prompt. On a terminal without a prompt: asks, writes, asks again."""

    run: RunPath  # the run directory
    prompt: Prompt = None  # what the text begins with; - reads it from standard input
    prompt_file: str = ""  # a file with the prompt
    prompts: str = ""  # a file with many prompts, one a line; - reads them from standard input
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    weights: Weights = "float32"  # int8: rounded to 8 bits, over twice as fast on a CPU, nearly the same text
    show_alternatives: Switch = False  # how likely each token was, and the five likeliest in its place
    json: Switch = False  # print one JSON object: samples with text, tokens and stopped_by
    writing: OmitArgPrefixes[WritingSettings] = field(default_factory=WritingSettings)


def run(words: list[str]) -> int:
    """Write as asked."""
    given = parse(Arguments, words, "generate")
    settings = GenerationSettings(**vars(given.writing))
    prompts = read_prompts(given)
    writer = Writer(Run(given.run), given.device, weights=given.weights)
    if prompts is None:
        return ask_and_write(writer, settings, given.show_alternatives)
    if given.json:
        samples = write(writer, prompts, settings, given.show_alternatives)
        named = [({"prompt": sample.prompt} if given.prompts else {}) | sample.to_table() for sample in samples]
        print_json({"samples": named})
    elif given.prompts:
        lines = writer.answers and settings.samples == 1  # an answer a line, for other programs
        show(writer, write(writer, prompts, settings, given.show_alternatives), numbered=not lines)
    else:
        answer(writer, prompts[0], settings, given.show_alternatives)
    return 0


def read_prompts(given: Arguments) -> list[str] | None:
    """The prompts from flag, file or pipe; None where the person at the terminal is to be asked."""
    ways = {"--prompt": given.prompt is not None, "--prompt-file": given.prompt_file, "--prompts": given.prompts}
    first, *others = [way for way, chosen in ways.items() if chosen] or [""]
    if others:
        raise UserError(f"{first} and {others[0]} both give the prompt. Choose one.")
    if given.prompts:
        text = read_text("prompts", given.prompts)
        if not text:
            raise UserError(f"There are no prompts in {given.prompts}. Write one on each line.")
        return text.split("\n")
    if given.prompt_file:
        return [read_text("prompt", given.prompt_file)]
    if given.prompt == "-" or (given.prompt is None and not sys.stdin.isatty() and not given.json):
        return [read_text("prompt", "-")]
    if given.prompt is None and given.json:
        return [""]
    return None if given.prompt is None else [given.prompt]


def read_text(what: str, name: str) -> str:
    """The text of a file, or for - of standard input."""
    if name == "-":
        return text_of(sys.stdin.buffer.read(), "standard input")
    try:
        return text_of(Path(name).read_bytes(), name)
    except OSError as error:
        raise UserError(f"The {what} file {name} cannot be read ({error.strerror}).") from error


def text_of(data: bytes, name: str) -> str:
    """A prompt's bytes as text, its last line end left out."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt in {name} is not UTF-8 text (at byte {error.start}).") from error


def write(writer: Writer, prompts: Sequence[str], settings: GenerationSettings, explained: bool) -> list[Sample]:
    """The samples of all prompts, one prompt's behind another's; behind a bar where that takes long."""
    samples: list[Sample] = []
    most = settings.tokens * settings.samples * len(prompts)
    with bar("Writing") as update:
        for _ in writer.steps(prompts, settings, samples):
            update(sum(len(sample.tokens) for sample in samples) / most)
    if explained:
        for sample in samples:
            writer.explain(sample, settings.unknown, settings.special)
    return samples


def show(writer: Writer, samples: Sequence[Sample], numbered: bool) -> None:
    """Whole texts, each with what the model expected, where that was asked for."""
    for number, sample in enumerate(samples, 1):
        if numbered:
            score = "" if sample.score is None else f" (score {sample.score.normalized:.4f})"
            print(f"--- {number}{score} ---")
        print(sample.text if writer.answers else sample.prompt + sample.text)
        if sample.expected is not None:
            print("\n" + table(sample))


def table(sample: Sample) -> str:
    """Each token of prompt and text with its probability, and the likeliest in its place, in columns."""
    from rich.cells import cell_len

    rows = [["", "position", "token", "p", "likeliest"]]
    of_prompt, of_text = sample.prompt_expected or [], sample.expected or []
    for position, expected in enumerate([*of_prompt, *of_text]):
        p = "-" if expected.log_probability is None else f"{math.exp(expected.log_probability):.3f}"
        others = [f"{visible(other.text)} {other.probability:.3f}" for other in expected.alternatives]
        part = "prompt" if position < len(of_prompt) else "text"
        rows.append([part, str(position), visible(expected.text), p, *others])
    widths = [max(cell_len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    padded = [[cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=False)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def answer(writer: Writer, prompt: str, settings: GenerationSettings, explained: bool) -> None:
    """Write after one prompt: as it comes, where it is a single text and nothing else."""
    if explained or settings.samples > 1:
        show(writer, write(writer, [prompt], settings, explained), numbered=settings.samples > 1)
    else:
        stream(writer, prompt, settings)


def stream(writer: Writer, prompt: str, settings: GenerationSettings) -> None:
    """Show the prompt, then the text as it is written."""
    pieces = writer.pieces(prompt, settings)
    first = next(pieces, "")  # a prompt that cannot be encoded fails before anything is shown
    if not writer.answers and sys.stdout.isatty():
        console_out = console().__class__(highlight=False, soft_wrap=True)
        console_out.print(prompt, style="dim", end="", markup=False)
    elif not writer.answers:
        sys.stdout.write(prompt)
    for piece in (first, *pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def ask_and_write(writer: Writer, settings: GenerationSettings, explained: bool) -> int:
    """Ask for a prompt, write, ask again; each text with a seed of its own. Ctrl-D or Ctrl-C ends it."""
    say("Give it the beginning of a text. An empty line starts from nothing; Ctrl-D ends.", "dim")
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        try:
            answer(writer, prompt, settings, explained)
        except UserError as error:
            say(str(error), "red")
        except KeyboardInterrupt:
            print()
        settings = replace(settings, seed=settings.seed + 1)
