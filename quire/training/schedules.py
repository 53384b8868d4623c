"""The learning rate over a run, as a share of its peak. To add one: a function, and a line in SCHEDULES."""

import math
from collections.abc import Callable

# Each takes progress (0 at the first step, 1 at the end), the floor it falls to, the share of the run that
# warmup-stable-decay falls over, and the age: the steps taken, in lengths of the warm-up.
Schedule = Callable[[float, float, float, float], float]


def constant(progress: float, floor: float, share: float, age: float) -> float:
    """The peak throughout."""
    return 1.0


def linear(progress: float, floor: float, share: float, age: float) -> float:
    """A straight line from the peak to the floor."""
    return 1.0 - (1.0 - floor) * progress


def cosine(progress: float, floor: float, share: float, age: float) -> float:
    """Half a cosine wave from the peak to the floor (Loshchilov and Hutter 2017)."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_stable_decay(progress: float, floor: float, share: float, age: float) -> float:
    """The peak, then a straight line to the floor over the last `share` of the run (Hu et al. 2024, MiniCPM)."""
    return (
        1.0 if progress < 1 - share else linear((progress - (1 - share)) / share if share else 0.0, floor, share, age)
    )


def inverse_square_root(progress: float, floor: float, share: float, age: float) -> float:
    """After the warm-up sqrt(warm-up / step), whenever the run may end (Vaswani et al. 2017, equation 3).

    With warm steps, rate = C^-0.5 min(step^-0.5, step warm^-1.5) has its peak, (C warm)^-0.5, at step = warm.
    """
    return max(1.0, age) ** -0.5


SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "warmup-stable-decay": warmup_stable_decay,
    "inverse-square-root": inverse_square_root,
}


def warmed_up(schedule: Schedule, step: int, warmup_steps: int, progress: float, floor: float, share: float) -> float:
    """The share of the peak at `step` (from 0): a straight rise over `warmup_steps`, then the schedule.

    While warming up the schedule already counts, as a ceiling: a short run never jumps.
    """
    age = (step + 1) / (warmup_steps + 1)
    return min(1.0, age) * schedule(min(1.0, progress), floor, share, age)
