"""quire plot: loss curves of one or more runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from quire.cli.flags import Switch, parse, print_json
from quire.errors import UserError
from quire.plots.loss import plot_losses
from quire.run import Run
from quire.training.curves import AXES, curve

Runs = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]]


@dataclass(frozen=True)
class Arguments:
    """Draw training and held-out loss of runs into a PNG."""

    runs: Runs  # the run directories
    over: Literal["step", "tokens", "time"] = "tokens"  # the horizontal axis
    bits_per_byte: Switch = False  # held-out bits per byte instead of nats: compares different tokenizers
    out: str = "losses.png"  # the picture
    json: Switch = False  # print one JSON object: the picture's path and the best of each run


def run(words: list[str]) -> int:
    """Draw, and say where."""
    given = parse(Arguments, words, "plot")
    if not given.runs:
        raise UserError("Name at least one run: quire plot RUN [RUN ...]. `quire runs` lists them.")
    curves = [curve(Run(path), given.over, given.bits_per_byte) for path in given.runs]
    for drawn in curves:
        if not drawn.validation and not drawn.training:
            raise UserError(f"{drawn.name} has no measurements yet: nothing to draw.")
    out = Path(given.out)
    unit = "bits per byte" if given.bits_per_byte else "nats per token"
    axis = "seconds" if given.over == "time" else f"{AXES[given.over]} trained on" if given.over == "tokens" else "step"
    plot_losses(curves, axis, out, unit)
    if given.json:
        best = {
            path: min((y for _, y in drawn.validation), default=None)
            for path, drawn in zip(given.runs, curves, strict=True)
        }
        print_json({"plot": str(out), "best": best})
    else:
        print(out)
    return 0
