"""How fast this machine trains a model: measured on real steps of that very model, for a few seconds."""

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from quire.data.prepare import Prepared
from quire.devices import memory_bytes, usable_cores
from quire.run import Run
from quire.training.loop import Trainer
from quire.training.settings import Settings
from quire.training.train import describe

HELD_OUT = 1 << 10  # tokens that the measured model would be evaluated on: it never is
FEWEST_STEPS = 3  # at each number of threads, after one that warms up
CONTENDED = 1.15  # wall seconds for each second of CPU time, on one thread, from which others must be computing too


@dataclass(frozen=True)
class Speed:
    """What a training step takes with so many threads: wall and CPU seconds."""

    threads: int
    step_seconds: float
    cpu_seconds: float

    @property
    def contended(self) -> bool:
        """Whether one thread waited while others computed; of several threads this says nothing."""
        return self.threads == 1 and self.step_seconds > CONTENDED * self.cpu_seconds


def measured(
    settings: Settings, prepared: Prepared, device: torch.device, seconds: float, threads: tuple[int, ...] = ()
) -> list[Speed]:
    """The speed of training at each number of `threads` (none: one, and one for each core), in about `seconds`.

    Trains on the first tokens of the text, in a folder that is deleted; generators and threads are left as they were.
    """
    counts = threads or tuple(sorted({1, usable_cores()}))
    counts = counts if device.type == "cpu" else counts[-1:]
    before = torch.get_num_threads()
    lengths = {"steps": 1_000_000, "epochs": 0.0, "tokens": 0, "minutes": 0.0}
    training = replace(settings.training, **lengths, compile="no", curriculum=(), decisions="")  # type: ignore[arg-type]
    settings = replace(settings, training=training)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), tempfile.TemporaryDirectory() as folder:
        manifest = describe(settings, prepared, [], device)
        held_out = prepared.validation[:HELD_OUT]
        run = Run.create(Path(folder) / "run", settings.tables(), prepared.tokenizer, manifest, held_out, {})
        trainer = Trainer(run, training, prepared.training, device, time.time())
        trainer.begin()
        trainer.wrap_model()
        trainer.update()  # warms up: allocates, and makes the optimizer's state
        found = [timed(trainer, count, seconds / len(counts)) for count in counts]
    torch.set_num_threads(before)
    return found


def timed(trainer: Trainer, threads: int, seconds: float) -> Speed:
    """The medians of as many steps as go into the time, at least three."""
    torch.set_num_threads(threads)
    trainer.update()
    walls, works, began = [], [], time.perf_counter()
    while len(walls) < FEWEST_STEPS or time.perf_counter() - began < seconds:
        wall, work = time.perf_counter(), time.process_time()
        trainer.update()
        walls.append(time.perf_counter() - wall)
        works.append(time.process_time() - work)
    return Speed(threads, median(walls), median(works))


def fastest(speeds: list[Speed]) -> Speed:
    """The one with the shortest steps; fewer threads where more gain less than a tenth."""
    best = speeds[0]
    for speed in speeds[1:]:
        if speed.step_seconds < 0.9 * best.step_seconds:
            best = speed
    return best


def memory_limit(device: torch.device) -> int:
    """Bytes that a training may use here: the GPU's, or this machine's and its control group's; 0: not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = memory_bytes()
    group = Path("/sys/fs/cgroup/memory.max")
    text = group.read_text().strip() if os.access(group, os.R_OK) else "max"
    return min(limit or int(text), int(text)) if text.isdigit() else limit


def described(device: torch.device) -> str:
    """The processor that trains, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {usable_cores()} cores" if device.type == "cpu" else device.type


