"""Going on with a run: exactly where it stopped, further than it was to go, and the proof that stopping is exact."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from quire import checkpoint, files, processes
from quire.config import from_table
from quire.data.reading import DataSettings
from quire.data.shards import TokenStream
from quire.errors import UserError
from quire.progress import say
from quire.run import Run
from quire.training.distributed import World, join, world_table
from quire.training.loop import Trainer
from quire.training.settings import Settings, TrainingSettings
from quire.training.texts import find_data
from quire.training.threads import prepare_machine
from quire.training.verify import first_difference

VERIFIED_STEPS = 6


def resume(
    run: Run | str | Path,
    *,
    steps: int = 0,
    minutes: float = 0.0,
    data: Sequence[str] = (),
    engine: str = "",
    device: str = "",
    threads: int = 0,
    parallel: str = "",
    began: float | None = None,
) -> Run:
    """Continue a run exactly where it stopped; a finished one trains `steps` or `minutes` more, if given.

    `data` says where the training text is now, if it has moved. `engine`, `device`, `threads` and `parallel` stand for
    the run's own from here on; of a finished run that trains no further, another `parallel` changes the form of its
    checkpoints. Gives the run, also where there is nothing to do.
    """
    began = began or time.time()
    run = run if isinstance(run, Run) else Run(run)
    if steps < 0 or minutes < 0 or (steps and minutes):
        raise UserError("Give --steps N or --minutes M, one of them, to train a finished run further.")
    world = join(settings_of(run).timeout)
    training = changed(run, engine, device, threads, parallel)
    with world.explained(), held(run, world, lambda: find_tokens(run, training, data)):
        looked_at = processes.on_leaders_machine()
        trainer = reopened(run, training, data, began, looked_at)
        found = trainer.load()
        state = trainer.state
        if processes.restarted() and (not state.finished or state.launch == processes.launch()):
            steps, minutes = 0, 0.0  # what was asked for has begun before
        ends_here = state.finished and not (steps or minutes)
        if ends_here and parallel and trainer.sharded != checkpoint.is_sharded(run.folder("last")):
            save_anew(trainer)
            say(f"{run.path} is finished; its checkpoints are now those of --parallel {parallel}.")
            return run
        if ends_here:
            say(
                f"{run.path} is finished (step {state.step}): nothing to resume."
                f" To train it further: quire resume {run.path} --minutes 5"
            )
            return run
        if (steps or minutes) and not state.finished:
            raise UserError(f"{run.path} is not finished (step {state.step}). Finish it first: quire resume {run.path}")
        trained_by(trainer)
        trainer.journal.cut_back(state)
        if steps or minutes:
            say(f"{run.path} trains on from step {state.step}; the learning rate warms up again.")
            trainer.stretch(steps, minutes)
            trainer.save("last")
        elif found:
            say(f"{run.path} resumes at step {state.step}.")
        else:
            say(f"{run.path} was stopped before its first checkpoint and begins anew.")
        trainer.fit()
    return run


def trained_by(trainer: Trainer) -> None:
    """Let the run's manifest say by how many processes it is trained from here on."""
    run, world = trainer.run, trainer.world
    if world.leads and run.manifest.get("world_size") != world.size:
        run.manifest = {**run.manifest, **world_table(trainer.settings, run.settings, world.size)}
        files.write_json(run.path / "manifest.json", run.manifest)


def save_anew(trainer: Trainer) -> None:
    """Write the checkpoints of a finished run as this training would: whole, or in parts."""
    for which in ("best", "last"):
        if checkpoint.exists(trainer.run.folder(which)):
            trainer.state = trainer.saving.load(trainer.run.folder(which))
            trainer.save(which)
            trainer.saving.finish()


def verify(
    run: Run | str | Path, *, data: Sequence[str] = (), engine: str = "", device: str = "", threads: int = 0
) -> str | None:
    """Train a few steps twice from the last checkpoint, once through a stop; the first part that differs, or None.

    A finished run begins a new stretch for it, since the end of a schedule may move nothing. The run itself is left
    as it is.
    """
    run = run if isinstance(run, Run) else Run(run)
    if join(settings_of(run).timeout).size > 1:
        raise UserError("A resume is verified by one process: call quire resume RUN --verify without torchrun.")
    first = reopened(run, changed(run, engine, device, threads, "ddp"), data)

    def trainer() -> Trainer:
        again = Trainer(run, first.settings, first.tokens, first.device, time.time())
        again.load()
        if again.state.finished:
            again.stretch(VERIFIED_STEPS, 0.0)
        return again

    with tempfile.TemporaryDirectory() as folder:
        return first_difference(trainer, Path(folder) / "checkpoint", VERIFIED_STEPS)


def training_lock(run: Run) -> AbstractContextManager[None]:
    """Held by the one process that trains a run."""
    sentence = f"Another process is training {run.path}. Wait for it, or stop it with Ctrl-C there."
    return files.locked(run.path / ".lock", sentence)


@contextlib.contextmanager
def held(run: Run, world: World, look: Callable[[], object]) -> Iterator[None]:
    """Within, nobody else trains the run; what a kill left of its checkpoints has been put right, and the leading
    process has had its `look` at the text, so that others need not."""
    what = f"held {run.path}"
    if not world.leads:
        world.follow(what)
        yield
        return
    with contextlib.ExitStack() as stack:
        with world.leading(what) as tell:
            stack.enter_context(training_lock(run))
            files.sweep(run.path / "checkpoints", "state.json")
            look()
            tell("held")
        yield


def settings_of(run: Run) -> TrainingSettings:
    """How a run is trained."""
    return from_table(TrainingSettings, run.config.get("training", {}), "training")


def changed(run: Run, engine: str = "", device: str = "", threads: int = 0, parallel: str = "") -> TrainingSettings:
    """How a run is trained from here on, where anything is given, and else as before."""
    if run.imported:
        raise UserError(
            f"{run.path} was imported: there is no training to resume. To train its model on a text:"
            f" quire finetune {run.path} {run.text_argument} --run NEW"
        )
    training = settings_of(run)
    if engine == "manual" and training.compile == "yes":
        training = replace(training, compile="no")  # what was compiled under the other engine no longer is
    given: dict[str, Any] = {"engine": engine, "device": device, "threads": threads, "parallel": parallel}
    return replace(training, **{name: value for name, value in given.items() if value})


def find_tokens(run: Run, training: TrainingSettings, data: Sequence[str] = (), looked_at: bool = False) -> TokenStream:
    """The tokens that a run trains on; see `find_data`."""
    settings = Settings(from_table(DataSettings, run.config.get("data", {}), "data"), run.settings, training)
    return find_data(run, settings, tuple(data), looked_at)


def reopened(
    run: Run,
    training: TrainingSettings | None = None,
    data: Sequence[str] = (),
    began: float = 0.0,
    looked_at: bool = False,
) -> Trainer:
    """A trainer for a run that exists, its checkpoint not loaded; the text must be the one it began with, and was
    `looked_at` where this process or another one of this machine has just found it."""
    training = training or changed(run)
    where, _ = prepare_machine(training)
    return Trainer(run, training, find_tokens(run, training, data, looked_at), where, began or time.time())
