"""quire generate: let a run's model write."""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from quire.cli.flags import RunPath, Switch, parse, print_json
from quire.errors import UserError
from quire.generation.generate import GenerationSettings, Writer
from quire.progress import console, say
from quire.run import Run

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
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: Switch = False  # print one JSON object: samples with text, tokens and stopped_by
    writing: OmitArgPrefixes[WritingSettings] = field(default_factory=WritingSettings)


def run(words: list[str]) -> int:
    """Write as asked."""
    given = parse(Arguments, words, "generate")
    settings = GenerationSettings(**vars(given.writing))
    prompt = read_prompt(given)
    writer = Writer(Run(given.run), given.device)
    if prompt is None:
        return ask_and_write(writer, settings)
    if given.json:
        print_json({"samples": [asdict(written) for written in writer.write([prompt], settings)]})
    elif settings.samples > 1:
        for number, written in enumerate(writer.write([prompt], settings), 1):
            print(f"--- {number} ---\n{prompt}{written.text}")
    else:
        stream(writer, prompt, settings)
    return 0


def read_prompt(given: Arguments) -> str | None:
    """The prompt from flag, file or pipe; None where the person at the terminal is to be asked."""
    if given.prompt is not None and given.prompt_file:
        raise UserError("--prompt and --prompt-file both give the prompt. Choose one.")
    if given.prompt_file:
        try:
            return text_of(Path(given.prompt_file).read_bytes(), given.prompt_file)
        except OSError as error:
            raise UserError(f"The prompt file {given.prompt_file} cannot be read ({error.strerror}).") from error
    if given.prompt == "-" or (given.prompt is None and not sys.stdin.isatty() and not given.json):
        return text_of(sys.stdin.buffer.read(), "standard input")
    if given.prompt is None and given.json:
        return ""
    return given.prompt


def text_of(data: bytes, name: str) -> str:
    """A prompt's bytes as text, its last line end left out."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt in {name} is not UTF-8 text (at byte {error.start}).") from error


def stream(writer: Writer, prompt: str, settings: GenerationSettings) -> None:
    """Show the prompt, then the text as it is written."""
    pieces = writer.pieces(prompt, settings)
    first = next(pieces, "")  # a prompt that cannot be encoded fails before anything is shown
    if sys.stdout.isatty():
        console_out = console().__class__(highlight=False, soft_wrap=True)
        console_out.print(prompt, style="dim", end="", markup=False)
    else:
        sys.stdout.write(prompt)
    for piece in (first, *pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def ask_and_write(writer: Writer, settings: GenerationSettings) -> int:
    """Ask for a prompt, write, ask again; each text with a seed of its own. Ctrl-D or Ctrl-C ends it."""
    say("Give it the beginning of a text. An empty line starts from nothing; Ctrl-D ends.", "dim")
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        try:
            stream(writer, prompt, settings)
        except UserError as error:
            say(str(error), "red")
        except KeyboardInterrupt:
            print()
        settings = replace(settings, seed=settings.seed + 1)
