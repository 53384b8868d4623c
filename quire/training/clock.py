"""Training by the clock: how --minutes is met, and met again.

Under --minutes the progress of a run (0 to 1) is a field of its state that grows by `rate` with each step. The clock
corrects the rate only at a decision: after a few steps, when a step's cost is known, at each evaluation, and each
time a quarter of the steps that remain is done, so that the corrections get closer towards the end. Every decision is
a line of decisions.jsonl; where one for a step is on record it is taken from there, not from the clock, so that a
resumed or repeated run is the same, bit for bit. Where the machine slows down so much that the time is past before the
schedule is, training is broken off.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quire import files
from quire.errors import UserError
from quire.progress import say
from quire.training.distributed import ALONE, World
from quire.training.state import TrainingState

PROBE_STEPS = 10  # after so many steps their cost is known, or
PROBE_SHARE = 0.03  # after this share of the time, but at least 2
MEASURED_STEPS = 4  # between decisions, at least
EVALUATIONS = 10  # at most, in a run
EVALUATION_SHARE = 0.05  # of the time may go into them, but the last one is always made
EXIT_SECONDS = 0.4  # for the last words and the process's end
BESIDE_SECONDS = 4.0  # what sample, plot and saving add to an evaluation, in a run of a minute or more
GRACE_SHARE, GRACE_SECONDS = 0.02, 1.0  # past the time before training is broken off in the middle of its schedule


@dataclass(frozen=True)
class Decision:
    """From `step` on, where the progress is `progress`, each step adds `rate`; what comes next, by step."""

    step: int
    progress: float
    rate: float
    next_decision: int
    next_evaluation: int
    threads: int = 0  # that computed it; 0: not on record


def read_decisions(path: Path) -> dict[int, Decision]:
    """The decisions on record in `path`, by step."""
    if not path.is_file():
        raise UserError(f"--decisions {path}: there is no such file. Name the decisions.jsonl of an earlier run.")
    try:
        return {row["step"]: Decision(**row) for row in files.read_lines(path)}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold the decisions of a run with --minutes.") from error


def evaluations(total_seconds: float, evaluation_seconds: float) -> int:
    """How many evaluations, of so many seconds each, a run of `total_seconds` makes: at least the last one."""
    return max(1, min(EVALUATIONS, int(EVALUATION_SHARE * total_seconds / max(evaluation_seconds, 1e-9))))


def seconds_beside(minutes: float) -> float:
    """What an evaluation takes beside measuring the held-out text, foreseen: shorter runs write and draw less."""
    return BESIDE_SECONDS * min(1.0, minutes)


def default_interval(steps: int) -> int:
    """Steps between the evaluations of a training of so many steps."""
    return max(10, math.ceil(steps / EVALUATIONS))


class Clock:
    """Wall time since `began` (time.time() at the command's start), and the decisions made by it."""

    def __init__(self, began: float, record: Path, threads: int = 0, world: World = ALONE) -> None:
        self.began, self.record, self.threads, self.world = world.first(began), record, threads, world
        self.decisions = read_decisions(record) if record.exists() else {}
        self.evaluation_seconds = 0.0  # what one took last; 0: not known yet
        self.step_seconds = 0.0  # what a step takes
        self._measured = 0  # steps over which that was measured: MEASURED_STEPS, once so many have been taken
        self._mark = (0, 0.0)  # step and time from which it is measured next

    def elapsed(self) -> float:
        """Seconds since the command began; of several processes, which decide alike, by the leading one's clock."""
        return self.world.first(time.time()) - self.began

    def start_measuring(self, step: int) -> None:
        """Steps from here on are measured: called where an evaluation ends."""
        self._mark = (step, self.elapsed())

    def measure(self, state: TrainingState) -> None:
        """Note what the steps since the mark took, at the end of each of them."""
        marked, seconds = self._mark
        taken = state.step - marked
        if not self.step_seconds:  # the very first step warms up: it counts only until there is another
            self.step_seconds = state.seconds - seconds
            self.start_measuring(state.step)
        elif taken >= min(MEASURED_STEPS, self._measured + 1):
            self.step_seconds, self._measured = (state.seconds - seconds) / taken, taken

    def decide(self, state: TrainingState, foreseen: Callable[[], float]) -> None:
        """Correct the state's progress, rate and what comes next, if this step calls for it.

        Called after each step, or after the evaluation where one is due; `foreseen` gives the seconds that measuring
        the held-out text is going to take, and is asked for once.
        """
        if (decision := self.decisions.get(state.step)) is None:
            if max(self.decisions, default=0) > state.step or not (decision := self._new(state, foreseen)):
                return
            self._keep(decision)
            self.start_measuring(state.step)
        state.progress, state.rate = decision.progress, decision.rate
        state.next_decision, state.next_evaluation = decision.next_decision, decision.next_evaluation

    def end(self, state: TrainingState) -> None:
        """Put on record that the stretch ended here, so that one that repeats it asks no clock to its end."""
        if state.step not in self.decisions:
            self._keep(Decision(state.step, 1.0, state.rate, state.step, state.step))

    def _keep(self, decision: Decision) -> None:
        decision = replace(decision, threads=self.threads)
        self.decisions[decision.step] = decision
        if self.world.leads:
            files.append_line(self.record, json.dumps(asdict(decision)), sync=True)

    def _new(self, state: TrainingState, foreseen: Callable[[], float]) -> Decision | None:
        """The decision to make at this step by the clock, if any."""
        total, step_seconds = state.minutes * 60, self.step_seconds
        if state.rate == 0:
            taken = state.step - state.start
            if taken < PROBE_STEPS and not (taken >= 2 and taken * step_seconds > PROBE_SHARE * total):
                return None
        if not self.evaluation_seconds:
            self.evaluation_seconds = foreseen() + seconds_beside(state.minutes)
        if state.rate == 0:
            self._warn(total)
        evaluation = self.evaluation_seconds
        spent = self.elapsed() - state.seconds_before
        left = total - spent - EXIT_SECONDS - evaluation  # the last evaluation is always made
        evaluated = state.step == state.next_evaluation
        if state.rate and left < -max(GRACE_SECONDS, GRACE_SHARE * total):  # the machine slowed down: stop here
            return Decision(state.step, 1.0, 1.0, state.step, state.step)
        if state.rate and not evaluated and state.step < state.next_decision:
            return None
        count = evaluations(total, evaluation)  # of the whole run
        target = state.progress + (state.next_evaluation - state.step) * state.rate  # progress at the next evaluation
        if state.rate == 0 or evaluated:
            target = state.progress + 1 / count
        if 1 - target < 0.5 / count:
            target = 1.0
        left -= round((1 - target) * count) * evaluation  # those before the last; what remains is for training steps
        steps = max(1, int(left / max(step_seconds, 1e-9)))
        rate = (1 - state.progress) / steps
        until = max(1, round((target - state.progress) / rate))
        return Decision(
            state.step, state.progress, rate, state.step + max(MEASURED_STEPS, steps // 4), state.step + until
        )

    def _warn(self, total: float) -> None:
        if self.evaluation_seconds > total / 3:
            say(
                f"Measuring the held-out text will take about {self.evaluation_seconds:.0f} s of the {total:.0f} s:"
                " a smaller model, or a smaller --validation FILE, leaves more time for training."
            )
