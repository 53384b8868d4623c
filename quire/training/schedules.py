"""The learning rate over a run, as a share of its peak. To add one: a function, and a line in SCHEDULES."""

import math
from collections.abc import Callable

# Each takes progress (0 at the first step, 1 at the end), the floor it falls to, and the share of the run that
# warmup-stable-decay falls over.
Schedule = Callable[[float, float, float], float]


def constant(progress: float, floor: float, share: float) -> float:
    """The peak throughout."""
    return 1.0


def linear(progress: float, floor: float, share: float) -> float:
    """A straight line from the peak to the floor."""
    return 1.0 - (1.0 - floor) * progress


def cosine(progress: float, floor: float, share: float) -> float:
    """Half a cosine wave from the peak to the floor (Loshchilov and Hutter 2017)."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_stable_decay(progress: float, floor: float, share: float) -> float:
    """The peak, then a straight line to the floor over the last `share` of the run (Hu et al. 2024, MiniCPM)."""
    return 1.0 if progress < 1 - share else linear((progress - (1 - share)) / share if share else 0.0, floor, share)


SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "warmup-stable-decay": warmup_stable_decay,
}


def warmed_up(schedule: Schedule, step: int, warmup_steps: int, progress: float, floor: float, share: float) -> float:
    """The share of the peak at `step` (from 0): a straight rise over `warmup_steps`, then the schedule.

    While warming up the schedule already counts, as a ceiling: a short run never jumps.
    """
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    return warm * schedule(min(1.0, progress), floor, share)
