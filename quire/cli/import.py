"""quire import: a model of another program becomes a run."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from quire.cli.flags import Switch, parse, print_json, program
from quire.interop import import_model
from quire.progress import say

Source = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH|NAME")]]


@dataclass(frozen=True)
class Arguments:
    """Make a run of a model that another program trained: generate, evaluate, fine-tune and export work as ever."""

    source: Source  # a model's file or folder, or a name: smollm2-135m-instruct
    run: str = ""  # the new run directory; without it runs/NAME after the source
    tokenizer: str = ""  # llama2.c: its tokenizer file, where there is not just one beside the model
    context_length: int = 0  # keep only so much of its context: less memory for long texts; 0: all
    json: Switch = False  # print one JSON object on standard output


def run(words: list[str]) -> int:
    """Import, and say what can be done with it."""
    given = parse(Arguments, words, "import")
    imported = import_model(given.source, given.run or None, given.tokenizer or None, given.context_length)
    settings, model = imported.settings, imported.model("cpu")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if given.json:
        print_json({
            "run": str(imported.path), "kind": settings.kind, "parameters": parameters,
            "vocabulary_size": settings.vocabulary_size, "context_length": settings.context_length,
        })  # fmt: skip
        return 0
    say(
        f"{imported.path}: {settings.named} of {parameters:,} parameters,"
        f" vocabulary {settings.vocabulary_size:,}, context {settings.context_length:,}.",
        "bold",
    )
    for name in ("licence", "attribution"):
        if name in imported.manifest:
            say(f"{name.capitalize()}: {imported.manifest[name]}")
    name, path, text = program(), imported.path, imported.text_argument.replace("TEXT", "YOUR.txt")
    say(f"\nNext:  {name} generate {path}\n       {name} finetune {path} {text} --minutes 10 --run NEW")
    return 0
