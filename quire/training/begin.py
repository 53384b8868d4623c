"""How a new run begins: the leading process makes it, and all processes of the launch train it.

Where torchrun has started them again, they go on with the run that they began.
"""

import itertools
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from quire import files, processes
from quire.config import write_checked_toml
from quire.data.elsewhere import is_index
from quire.data.shards import INDEX, TokenStream
from quire.errors import UserError
from quire.progress import say
from quire.run import Run
from quire.training.distributed import join
from quire.training.loop import Trainer
from quire.training.resume import reopened, resume, settings_of, training_lock
from quire.training.settings import Settings, TrainingSettings
from quire.training.texts import given_text
from quire.training.threads import find_threads, in_words

BEGUN = "begun"  # the name under which the processes of a launch learn what the leading one has begun


@dataclass(frozen=True)
class NewRun:
    """A run that has just been made, and what a Trainer wants to know of it."""

    run: Run
    training: TrainingSettings
    tokens: np.ndarray | TokenStream  # to train on
    device: torch.device
    measure: bool  # whether the number of threads is to be found by measurement
    keep: bool = False  # also where training fails before its first step: it may hold the only copy of a text


def begin_run(
    make: Callable[[], NewRun],
    settings: Settings,
    path: Path | None,
    began: float,
    begin: Callable[[Trainer], None] = Trainer.begin,
) -> Run:
    """Train the run that `make` makes, in all processes; `begin` sets each one's trainer going.

    `settings` and `path` are those from which it is made, and by which one that was begun before is known.
    """
    world = join(settings.training.timeout)
    if not world.leads:
        return train_along(world.follow(BEGUN), began, begin)
    with world.leading(BEGUN) as tell:
        before = begun_before(settings, path)
        new = None if before else make()
        tell(f"train {new.run.path}" if new else f"resume {before}")
    return train_new(new, began, begin) if new else resume(str(before), began=began)


def begun_before(settings: Settings, path: Path | None) -> Path | None:
    """The run that this launch began before torchrun started its processes again, or None."""
    if not processes.restarted():
        return None
    named = given_text(settings)[0].data.named if path is None else ()
    for place in [path] if path else names_after(named[0]):
        if not place.exists():
            break
        if whose(place) != processes.launch():
            continue
        whole = (place / "config.toml").is_file()
        if whole and not ("finetuned_from" in Run(place).manifest and Run(place).last_folder() is None):
            return place
        files.remove(place)  # killed before it was a run, or before it had the weights to go on from
        break
    return None


def whose(place: Path) -> str:
    """The launch that made a run, "" where that is no run, or not to be read."""
    manifest = place / "manifest.json"
    try:
        return str(files.read_json(manifest).get("launch", "")) if manifest.is_file() else ""
    except UserError:
        return ""


def train_new(new: NewRun, began: float, begin: Callable[[Trainer], None]) -> Run:
    """Train a run that has just been made. One that fails before its first step is deleted, unless it is to be kept."""
    run, training, trainer = new.run, new.training, None
    try:
        with join(training.timeout).explained(), training_lock(run):
            trainer = Trainer(run, training, new.tokens, new.device, began)
            begin(trainer)
            if new.measure and trainer.world.size == 1:
                take_threads(trainer)
            announce(run, trainer)
            trainer.fit()
    except (Exception, KeyboardInterrupt):
        if not new.keep and (trainer is None or trainer.state.step == 0):
            shutil.rmtree(run.path, ignore_errors=True)  # it holds nothing yet: leave the name free for the next try
        raise
    return run


def train_along(told: str, began: float, begin: Callable[[Trainer], None]) -> Run:
    """Train the run that the leading process has told of."""
    how, _, path = told.partition(" ")
    if how == "resume":
        return resume(path, began=began)
    if not Path(path).exists():
        raise UserError(
            f"Process {processes.rank()} on {platform.node()} does not see {path}, which process 0 has made. All"
            " machines need one folder for the run: give --run a path that all of them share."
        )
    run = Run(path)
    with join(settings_of(run).timeout).explained():
        trainer = reopened(run, began=began, looked_at=processes.on_leaders_machine())
        begin(trainer)
        trainer.fit()
    return run


def take_threads(trainer: Trainer) -> None:
    """Find the number of threads by measurement, and write it into the run."""
    found = find_threads(trainer)
    if not found.seconds:
        return
    run, each = trainer.run, {str(count): round(seconds, 4) for count, seconds in found.seconds.items()}
    trainer.settings = replace(trainer.settings, threads=found.threads)
    run.manifest = {**run.manifest, "threads": found.threads, "seconds_a_step_by_threads": each}
    files.write_json(run.path / "manifest.json", run.manifest)
    run.config = {**run.config, "training": {**run.config["training"], "threads": found.threads}}
    write_checked_toml(run.path / "config.toml", run.config)


def announce(run: Run, trainer: Trainer) -> None:
    """What is about to be trained, and for how long."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    state, shape = trainer.state, run.settings
    size, whole = trainer.world.size, "each a part of the model" if trainer.sharded else "each a copy of the model"
    together = f" in each of {size} processes, {whole}" if size > 1 else ""
    length = f"{state.end - state.start:,} steps" if state.end else f"{state.minutes:g} minutes"
    say(
        f"Training {run.path}: {shape.named} of {parameters:,} parameters, context {shape.context_length},"
        f" for {length} on {trainer.device} ({in_words(torch.get_num_threads())}){together}."
    )
    if trainer.settings.curriculum:
        say(trainer.curriculum.sentence(state.stage))


# ---- names and places ----


def free_path(text: str) -> Path:
    """runs/NAME after a text, or NAME-2, NAME-3 ... where that is taken."""
    return next(path for path in names_after(text) if not path.exists())


def names_after(text: str) -> Iterator[Path]:
    """runs/NAME after a text, then NAME-2, NAME-3 ... without an end."""
    named = re.sub(r"[?#].*", "", text) if "://" in text else text
    named = named.removesuffix(INDEX) if is_index(text) else named  # a prepared text is called as its folder is
    bare = "standard-input" if text == "-" else named.rstrip("/\\")
    stem = re.split(r"[/\\]", bare)[-1].split(".")[0] or Path(bare).resolve().name
    name = re.sub(r"[^\w-]+", "-", stem).strip("-") or "run"
    return (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
