"""quire export: a run's model for other programs."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from quire.cli.flags import RunPath, Switch, parse, print_json
from quire.errors import UserError
from quire.interop import EXPORTERS, export_model

To = Annotated[str, tyro.conf.arg(metavar="|".join(EXPORTERS), help_behavior_hint="(required)")]
Weights = Literal["", "f32", "f16", "q8_0"]


@dataclass(frozen=True)
class Arguments:
    """Write a run's best model in another program's format, with its tokenizer."""

    run: RunPath  # the run directory
    to: To = ""  # the format
    out: str = ""  # the file or folder to write; one that exists is refused
    type: Weights = ""  # gguf: how weights are stored; without it f32
    json: Switch = False  # print one JSON object on standard output


def run(words: list[str]) -> int:
    """Export, and say where."""
    given = parse(Arguments, words, "export")
    if not given.to or not given.out:
        raise UserError(f"Say --to {'|'.join(EXPORTERS)} and --out PATH.")
    out = export_model(given.run, given.to, given.out, given.type)
    if given.json:
        print_json({"run": given.run, "to": given.to, "out": str(out)})
    else:
        print(out)
    return 0
