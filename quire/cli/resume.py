"""quire resume: continue a run."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from quire.cli.ending import show_ending
from quire.cli.flags import RunPath, Switch, parse, print_json
from quire.cli.main import BEGAN
from quire.errors import UserError
from quire.progress import say
from quire.run import Run
from quire.training.resume import VERIFIED_STEPS, resume, verify

Paths = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ...", help_behavior_hint="")]


@dataclass(frozen=True)
class Arguments:
    """Continue a run exactly where it stopped; with --steps or --minutes, train a finished run further."""

    run: RunPath  # the run directory
    steps: int = 0  # train a finished run so many steps further; the learning rate warms up again
    minutes: float = 0.0  # train a finished run so much longer
    verify: Switch = False  # prove that stopping changes nothing: train a few steps twice, compare bits, keep nothing
    data: Paths = ()  # where the training text is now, if it moved
    engine: str = ""  # autograd or manual, if it is to change
    device: str = ""  # another device than before
    threads: int = 0  # another number of CPU threads; results then differ in the last bits
    parallel: Literal["", "ddp", "fsdp"] = ""  # under torchrun, if it is to change: copies of the model, or parts
    json: Switch = False  # print one JSON object on standard output at the end, and nothing else there


def run(words: list[str]) -> int:
    """Resume, continue or verify."""
    if len(words) > 1 and not words[1].startswith("-"):
        raise UserError(
            f"A run resumes on its own text. To train its model on {words[1]}: quire finetune {words[0]} {words[1]}"
            " --run NEW; to say where its own text is now: --data PATH."
        )
    given = parse(Arguments, words, "resume")
    if given.verify:
        return show_proof(given)
    opened, data = Run(given.run), list(given.data)
    resume(
        opened, steps=given.steps, minutes=given.minutes, data=data, engine=given.engine, device=given.device,
        threads=given.threads, parallel=given.parallel, began=BEGAN,
    )  # fmt: skip
    return show_ending(opened, given.json)


def show_proof(given: Arguments) -> int:
    """Say whether a resume is exact here."""
    different = verify(
        given.run, data=list(given.data), engine=given.engine, device=given.device, threads=given.threads
    )
    if given.json:
        print_json({"run": given.run, "exact": different is None, "first_difference": different})
    elif different is None:
        say(f"Exact: {VERIFIED_STEPS} steps at once and {VERIFIED_STEPS} steps through a stop gave the same bits.")
    if different is not None:
        raise UserError(f"Not exact: {different} differs after a stop. A GPU's kernels may vary from call to call.")
    return 0
