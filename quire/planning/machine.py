"""How fast this machine trains a model: measured on real steps of that very model, for a few seconds."""

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from quire.data.prepare import Prepared
from quire.evaluation.loss import GPU_TOKENS
from quire.run import Run
from quire.training.distributed import ALONE
from quire.training.loop import Trainer
from quire.training.settings import Settings
from quire.training.threads import Reading, judged, measured_threads, reading, thread_candidates
from quire.training.train import describe

HELD_OUT = 1 << 10  # tokens that the model is evaluated on, on a CPU; on a GPU one whole batch of them
COUNTED = 1 << 17  # tokens that are counted for it, where the model takes counts
STEPS = 3  # measured at least, after one that warms up, where there is one number of threads to try


@dataclass(frozen=True)
class Speed:
    """What a training step takes, in wall seconds, with so many threads, and measuring the whole held-out text; a
    sentence where other programs compute too.

    `cpu_seconds` are those of a step, all threads together; None where several numbers of threads were tried.
    """

    threads: int
    step_seconds: float
    evaluation_seconds: float = 0.0
    contention: str | None = None
    cpu_seconds: float | None = None


def measured(settings: Settings, prepared: Prepared, device: torch.device, seconds: float, threads: int = 0) -> Speed:
    """The speed of training with so many `threads`, 0: with the number that is fastest; takes about `seconds`.

    Trains on the text in a folder that is deleted; random generators and torch's threads are left as they were. Nothing
    is compiled. An evaluation is that of the held-out text's beginning, times the rest of it.
    """
    before, first = torch.get_num_threads(), reading()
    lengths = {"steps": 1_000_000, "epochs": 0.0, "tokens": 0, "minutes": 0.0}
    stages = settings.training.curriculum if len(settings.training.curriculum) == 1 else ()
    training = replace(settings.training, **lengths, compile="no", curriculum=stages, decisions="", parallel="ddp")  # type: ignore[arg-type]
    settings = replace(settings, training=training)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), tempfile.TemporaryDirectory() as folder:
        manifest = describe(settings, prepared, [], device)
        held_out = prepared.validation[: HELD_OUT if device.type == "cpu" else GPU_TOKENS]
        counts = settings.model.count(prepared.training[max(0, len(prepared.training) - COUNTED) :])
        run = Run.create(
            Path(folder) / "run", settings.tables(), prepared.tokenizer, manifest, held_out, {}, counts=counts
        )
        trainer = Trainer(run, training, prepared.training, device, time.time(), ALONE)
        trainer.begin()
        trainer.wrap_model()
        speed = None
        if not threads and device.type == "cpu":
            found = measured_threads(trainer.update, thread_candidates(), seconds)
            threads = found.threads
            speed = Speed(threads, found.seconds[threads]) if found.seconds else None
        torch.set_num_threads(threads or before)
        speed = speed or timed(trainer, seconds)
        evaluation = 0.0
        if len(held_out) > 1:  # else planning/measure.py refuses it
            evaluation = trainer.foreseen_evaluation() * len(prepared.validation) / len(held_out)
        torch.set_num_threads(before)
    return replace(speed, evaluation_seconds=evaluation, contention=contention(first))


def timed(trainer: Trainer, seconds: float) -> Speed:
    """The medians of as many steps as go into the time, at least three."""
    trainer.update()  # warms up: allocates, and makes the optimizer's state
    began = time.perf_counter()
    walls: list[float] = []
    works: list[float] = []
    while len(walls) < STEPS or time.perf_counter() - began < seconds:
        wall, work = time.perf_counter(), time.process_time()
        trainer.update()
        walls.append(time.perf_counter() - wall)
        works.append(time.process_time() - work)
    return Speed(torch.get_num_threads(), median(walls), cpu_seconds=median(works))


def contention(first: Reading | None) -> str | None:
    """A sentence where other programs held this one up since the first reading."""
    last = reading()
    return judged(first, last, os.cpu_count() or 1) if first and last else None
