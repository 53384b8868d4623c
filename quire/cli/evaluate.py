"""quire evaluate: how well a run's model predicts."""

from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from quire.cli.flags import RunPath, Switch, Texts, parse, print_json
from quire.evaluation.evaluate import evaluate
from quire.run import Run
from quire.tokenizers.tokenizer import Unknown

Stride = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: windows side by side)")]


@dataclass(frozen=True)
class Arguments:
    """Measure a run's best model on its held-out text, or on the whole of another TEXT."""

    run: RunPath  # the run directory
    text: Texts = ()  # files, folders, globs, addresses or corpora; none: the run's held-out text
    pairs: str = ""  # a file of pairs of a source and a target, or a task's name; none: those the run holds out
    translations: Switch = False  # of pairs: let the model write a target for each source; exact match, BLEU and chrF
    beams: int = 1  # with --translations: how many texts a search follows at once; 1: the likeliest token each time
    stride: Stride = None  # overlapping windows, each for so many new tokens: more context, slower, a lower loss
    unknown: Unknown = "error"  # characters of TEXT outside the vocabulary: refuse, skip or replace them
    encoding: str = "utf-8"  # how TEXT is encoded
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: Switch = False  # print one JSON object on standard output


def run(words: list[str]) -> int:
    """Measure and print."""
    given = parse(Arguments, words, "evaluate")
    found = evaluate(
        Run(given.run),
        given.text,
        unknown=given.unknown,
        stride=given.stride,
        encoding=given.encoding,
        device=given.device,
        pairs=given.pairs,
        translations=given.translations,
        beams=given.beams,
    )
    if given.json:
        print_json({key: value for key, value in asdict(found).items() if value is not None})
        return 0
    print(f"validation loss  {found.validation_loss:.4f} nats per token")
    print(f"perplexity       {found.perplexity:.4f}")
    print(f"bits per byte    {found.bits_per_byte:.4f}")
    overlapping = f" overlapping, a stride of {found.stride} tokens (not the standard measure)" if found.stride else ""
    windows = f"in windows of {found.context_length}{overlapping}"
    if found.pairs:
        windows = f"the targets of {found.pairs:,} pairs"
    print(f"measured on      {found.tokens:,} tokens, {found.bytes:,} bytes, {windows}")
    if found.exact_match is not None:
        print(f"exact match      {found.exact_match:.2%} of what the model writes is the target itself")
    if found.bleu is not None:
        print(f"BLEU             {found.bleu:.2f}")
        print(f"chrF             {found.chrf:.2f}")
    if found.unknown:
        what = "left out" if given.unknown == "skip" else "replaced"
        print(f"unknown          {found.unknown:,} characters {what}: the figures are for the rest of the text")
    return 0
