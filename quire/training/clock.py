"""Training by the clock: how --minutes is met, and met again.

Under --minutes the progress of a run (0 to 1) is a field of its state that grows by `rate` with each step. Only at a
decision does the clock correct the rate: once after a few steps, when a step's cost is known, and then at each
evaluation. Every decision is a line of decisions.jsonl; where a decision for a step is on record it is taken from
there, not from the clock, so that a resumed or repeated run is the same, bit for bit.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from quire import files
from quire.progress import say
from quire.training.state import TrainingState

PROBE_STEPS = 10  # after so many steps their cost is known, or
PROBE_SHARE = 0.03  # after this share of the time, but at least 2
EVALUATIONS = 10  # at most, in a run
EVALUATION_SHARE = 0.15  # of the time may go into them
EXIT_SECONDS = 0.8  # for loading the best model, the last words and the process's end
GRACE_SHARE, GRACE_SECONDS = 0.02, 1.0  # past the time before training is broken off in the middle of its schedule


@dataclass(frozen=True)
class Decision:
    """From `step` on, where the progress is `progress`, each step adds `rate`; the next evaluation follows."""

    step: int
    progress: float
    rate: float
    next_evaluation: int


class Clock:
    """Wall time since `began` (time.time() at the command's start), and the decisions made by it."""

    def __init__(self, began: float, record: Path) -> None:
        self.began, self.record = began, record
        self.decisions = {row["step"]: Decision(**row) for row in files.read_lines(record)}
        self.evaluation_seconds = 0.0  # what one took last; 0: not known yet
        self.sample_seconds = 0.0  # what writing a sample took last: one more is shown at the very end
        self._mark: tuple[int, float] | None = None  # step and time from which a step's cost is measured

    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.time() - self.began

    def start_measuring(self, step: int) -> None:
        """Steps from here on are measured: called where an evaluation ends."""
        self._mark = (step, self.elapsed())

    def decide(self, state: TrainingState, evaluation_estimate: float) -> bool:
        """Correct progress, rate and next evaluation, if this step calls for it; True where it did.

        Called after each step; `evaluation_estimate`, in steps, stands in until an evaluation has been measured.
        """
        if (decision := self.decisions.get(state.step)) is None:
            if max(self.decisions, default=0) > state.step or not (decision := self._new(state, evaluation_estimate)):
                return False
            self.decisions[state.step] = decision
            files.append_line(self.record, _json(decision))
        state.progress, state.rate, state.next_evaluation = decision.progress, decision.rate, decision.next_evaluation
        return True

    def _new(self, state: TrainingState, evaluation_estimate: float) -> Decision | None:
        total = state.minutes * 60
        spent = state.seconds - state.seconds_before
        step_seconds = self._step_seconds(state.step)
        evaluation = self.evaluation_seconds or evaluation_estimate * step_seconds
        left = total - spent - EXIT_SECONDS - self.sample_seconds - evaluation  # the last evaluation is always made
        taken = state.step - state.start
        if state.rate == 0:
            trained = step_seconds * taken
            if taken < PROBE_STEPS and not (taken >= 2 and trained > PROBE_SHARE * total):
                return None
            if evaluation > total / 3:
                say(
                    f"Measuring the held-out text will take about {evaluation:.0f} s of the {total:.0f} s:"
                    " a smaller model, or a smaller --validation FILE, leaves more time for training."
                )
        elif left < -max(GRACE_SECONDS, GRACE_SHARE * total):
            return Decision(state.step, 1.0, 1.0, state.step)  # the machine slowed down: stop here
        elif state.step < state.next_evaluation:
            return None
        count = max(1, min(EVALUATIONS, int(EVALUATION_SHARE * total / max(evaluation, 1e-9))))
        more = round((1 - state.progress) * count) - 1  # evaluations still to come before the last
        left -= max(0, more) * evaluation
        steps = max(1, int(left / max(step_seconds, 1e-9)))
        rate = (1 - state.progress) / steps
        interval = max(1, min(steps, round(1 / count / rate)))
        if steps - interval < interval / 2:
            interval = steps
        return Decision(state.step, state.progress, rate, state.step + interval)

    def _step_seconds(self, step: int) -> float:
        """Seconds a step takes, since the last mark; the very first step, which warms up, counts least."""
        assert self._mark is not None, "the clock is marked before the first step"
        marked, seconds = self._mark
        return (self.elapsed() - seconds) / max(1, step - marked)


def _json(decision: Decision) -> str:
    import json

    return json.dumps(asdict(decision))
