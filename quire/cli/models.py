"""quire models: the kinds of model there are, the presets of each, and what they cost."""

import sys
from dataclasses import dataclass
from typing import Any

from quire.cli.flags import Switch, parse, print_json
from quire.cli.runs import size
from quire.config import PRESETS
from quire.inspection.size import size_of
from quire.models import MODELS
from quire.progress import bar
from quire.training.settings import layered, typed

CHARACTERS = 100  # the vocabulary that a preset without one is measured with: what a text in English has, about


@dataclass(frozen=True)
class Arguments:
    """List the presets by kind of model: parameters, memory to train and to write with, arithmetic for each token.

    Memory is that of float32 and Adam at the preset's batch size, with and without --gradient-checkpointing. A preset
    without a vocabulary is measured with one of 100 characters.
    """

    json: Switch = False  # print one JSON object on standard output


def run(words: list[str]) -> int:
    """List them."""
    given = parse(Arguments, words, "models")
    rows = []
    with bar("measuring") as show_progress:
        for number, name in enumerate(PRESETS):
            show_progress(number / len(PRESETS), preset=name)
            rows.append(row(name))
    rows.sort(key=lambda line: list(MODELS).index(line["kind"]))
    if given.json:
        print_json({"models": rows})
    else:
        show(rows)
    return 0


def row(name: str) -> dict[str, Any]:
    """What the table shows of one preset."""
    settings = typed(layered(name))
    vocabulary = settings.model.vocabulary_size or CHARACTERS
    # A separator, for models that tell documents apart: any token will do for measuring.
    found = size_of(settings.with_model(vocabulary_size=vocabulary, separator=0).model)
    windows = settings.training.batch_size
    return {
        "kind": settings.model.kind,
        "preset": name,
        "parameters": found.parameters,
        "vocabulary_size": vocabulary,
        "context_length": settings.model.context_length,
        "training_bytes": found.training_bytes(windows),
        "checkpointed_training_bytes": found.training_bytes(windows, recomputed=True),
        "writing_bytes": found.writing_bytes,
        "flops_per_token": found.flops_per_token,
        "training_flops_per_token": 3 * found.flops_per_token,
        "description": PRESETS[name].read_text(encoding="utf-8").partition("\n")[0].removeprefix("# "),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("kind", "preset", "parameters", "to train", "checkpointed", "to write", "flops/token", "what"):
        number = name not in ("kind", "preset", "what")
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=name != "what")
    for line in rows:
        table.add_row(
            line["kind"],
            line["preset"],
            amount(line["parameters"]),
            size(line["training_bytes"]),
            size(line["checkpointed_training_bytes"]),
            size(line["writing_bytes"]),
            amount(line["training_flops_per_token"]),
            line["description"],
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # a pipe has no width of its own
    console.print(table)
    console.print(
        "Memory in float32 by Adam at the preset's batch size; arithmetic of training, forward and backward, for each"
        " token. Take one: quire train TEXT --preset NAME",
        style="dim",
    )


def amount(count: int) -> str:
    """A large number for a person: 124 M."""
    for unit, length in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= length:
            return f"{count / length:.3g} {unit}"
    return str(count)
