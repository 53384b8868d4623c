"""How many threads compute fastest here, found by measurement, and whether other programs hold them up.

More threads are not always faster: small layers wait for one another more than they compute, and where another program
wants the same cores, each step waits for its slowest thread (benchmarks/NOTES.md, "Threads that wait").
"""

import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quire import checkpoint, processes
from quire.devices import choose_device, keep_freed_memory, set_threads, unused_card, usable_cores
from quire.progress import say
from quire.training import state as states
from quire.training.distributed import own_device
from quire.training.settings import TrainingSettings

if TYPE_CHECKING:
    import torch

    from quire.training.loop import Trainer

NEARLY = 1.05  # of two numbers of threads the smaller one is taken, where it takes at most so much longer
TRIED_SHARE, TRIED_SECONDS = 0.015, 30.0  # of the time of a run go into measuring, if it is as long as that
ROUNDS = 5  # of measurements, at most
WATCHED_SECONDS = 3.0  # after which contention is judged
SLOWED = 1.2  # times the time that it would take alone: worth a sentence


@dataclass(frozen=True)
class Measured:
    """The number of threads to take, and the seconds of a step with each that was tried (none: no time for it)."""

    threads: int
    seconds: dict[int, float]


def thread_candidates() -> list[int]:
    """All cores that this process may use, half of them (where two share one physical core), and one."""
    cores = usable_cores()
    return sorted({cores, max(1, cores // 2), 1}, reverse=True)


def in_words(threads: int) -> str:
    """A number of threads in words."""
    return f"{threads} thread{'s' * (threads != 1)}"


def measured_threads(step: Callable[[], object], candidates: Sequence[int], seconds: float) -> Measured:
    """Time `step` with each number of threads by turns, for about `seconds` at most.

    Where not even one round has room, or there is nothing to choose from, it is the first candidate. The number of
    threads that torch uses is as before in the end.
    """
    import torch

    before, began = torch.get_num_threads(), time.perf_counter()
    taken: dict[int, list[float]] = {count: [] for count in candidates}
    if len(taken) < 2 or seconds <= 0:
        return Measured(candidates[0], {})
    try:
        torch.set_num_threads(candidates[0])
        step()  # warms up: memory is asked for, code is loaded
        longest = time.perf_counter() - began
        while time.perf_counter() - began + longest * len(taken) <= seconds and len(taken[candidates[0]]) < ROUNDS:
            for count, times in taken.items():
                torch.set_num_threads(count)
                started = time.perf_counter()
                step()
                times.append(time.perf_counter() - started)
            longest = max(times[-1] for times in taken.values())
    finally:
        torch.set_num_threads(before)
    if not taken[candidates[0]]:
        return Measured(candidates[0], {})
    typical = {count: statistics.median(times) for count, times in taken.items()}
    limit = NEARLY * min(typical.values())
    return Measured(min(count for count, each in typical.items() if each <= limit), typical)


def find_threads(trainer: "Trainer") -> Measured:
    """Measure which number of threads steps of this very training are fastest with; leaves everything as it was.

    Only under --minutes, on a CPU: a run of N steps is to be the same each time it is begun on a machine.
    """
    import torch

    seconds = 60 * trainer.state.minutes
    if trainer.device.type != "cpu" or trainer.sharded or not seconds or seconds < TRIED_SECONDS:
        return Measured(torch.get_num_threads(), {})
    state, trainer.state = trainer.state, copy.deepcopy(trainer.state)
    model = {name: tensor.clone() for name, tensor in checkpoint.model_tensors(trainer.model).items()}
    training = states.training_tensors(trainer.model, trainer.optimizers, trainer.scaler)
    training = {name: tensor.clone() for name, tensor in training.items()}
    try:
        trainer.wrap_model()
        found = measured_threads(trainer.update, thread_candidates(), TRIED_SHARE * seconds)
    finally:
        trainer.state = state
        checkpoint.load_model_tensors(trainer.model, model, trainer.run.path)
        states.restore_training_tensors(training, trainer.model, trainer.optimizers, trainer.scaler)
    torch.set_num_threads(found.threads)
    return found


def prepare_machine(training: TrainingSettings) -> "tuple[torch.device, int]":
    """The device and the number of threads; says when a card lies idle. Processes of one machine share its cores."""
    device = own_device(choose_device(training.device))
    if sentence := unused_card():
        say(sentence, "yellow")
    keep_freed_memory()
    threads = training.threads
    if (beside := processes.local_size()) > 1:
        threads = max(1, min(threads or usable_cores(), usable_cores()) // beside)
    return device, set_threads(threads)


# ---- contention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What Linux has counted up to a moment, in seconds."""

    now: float
    own: float  # processor time of this process
    waited: float  # time in which its threads could have run, and had no core
    busy: float  # processor time of all programs, on all cores
    throttled: float  # time for which the control group's quota stopped it


class Watch:
    """Looks whether other programs hold this process up; says it once. Knows nothing where there is no /proc."""

    def __init__(self) -> None:
        self.first = reading()
        self.said = self.first is None

    def sentence(self) -> str | None:
        """What to say now, if anything, of the time since the watch began."""
        if self.said or self.first is None or time.monotonic() - self.first.now < WATCHED_SECONDS:
            return None
        if (last := reading()) is None:
            return None
        sentence = judged(self.first, last, os.cpu_count() or 1)
        self.said = sentence is not None
        return sentence


def judged(first: Reading, last: Reading, cores: int) -> str | None:
    """The sentence about the time between two readings, or None where nothing held this process up."""
    passed, own = last.now - first.now, max(last.own - first.own, 1e-3)
    if (stopped := (last.throttled - first.throttled) / passed) >= 1 - 1 / SLOWED:
        return f"This process has used up its quota of processor time for {stopped:.0%} of the time, and waits then."
    slowed = 1 + (last.waited - first.waited) / own
    if slowed < SLOWED:
        return None
    others = min(1.0, max(0.0, (last.busy - first.busy - own) / (passed * cores)))
    return (
        f"Other programs use about {others:.0%} of this machine: training takes about {slowed:.1f} times as long as it"
        " would alone."
    )


def reading() -> Reading | None:
    """The counts now, or None on a system that does not keep them."""
    try:
        tasks = [task.joinpath("schedstat").read_text().split() for task in Path("/proc/self/task").iterdir()]
        all_cores = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        waited = sum(int(task[1]) for task in tasks) / 1e9
    except (OSError, ValueError, IndexError):
        return None
    idle = all_cores[3] + all_cores[4]  # idle, and waiting for a disk
    busy = (sum(all_cores) - idle) / os.sysconf("SC_CLK_TCK")
    return Reading(time.monotonic(), time.process_time(), waited, busy, _throttled())


def _throttled() -> float:
    try:
        rows = dict(row.split() for row in Path("/sys/fs/cgroup/cpu.stat").read_text().splitlines())
        return int(rows["throttled_usec"]) / 1e6
    except (OSError, ValueError, KeyError):
        return 0.0
