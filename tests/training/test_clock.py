"""--minutes, under a clock that the tests turn."""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from quire.errors import UserError
from quire.generation.generate import Writer
from quire.planning import train as planning_train
from quire.run import Run
from quire.training import clock, loop, train
from quire.training import resume as resuming
from quire.training.loop import Trainer
from quire.training.resume import resume

Cost = Callable[[int, float], float]


@dataclass
class Machine:
    """What everything costs, in seconds of its own clock: `step` by the number of the step and the time now."""

    step: Cost
    evaluation: float = 2.0
    sample: float = 0.3
    saving: float = 0.1
    now: float = 1e6

    def time(self) -> float:
        return self.now

    monotonic = time

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def spends(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def spending(*arguments: Any, **options: Any) -> Any:
            self.now += getattr(self, name)
            return act(*arguments, **options)

        return spending


@pytest.fixture
def on(lab, monkeypatch):
    """on(machine, act, ...): act on that machine; gives what it gives, and the seconds until the command's exit."""

    def act_on(machine: Machine, act: Callable[..., Run], *arguments: Any, **options: Any) -> tuple[Run, float]:
        began = machine.now
        with monkeypatch.context() as patch:
            for module in (clock, loop, train, resuming, planning_train):
                patch.setattr(module, "time", machine)
            update = Trainer.update

            def costly(trainer: Trainer) -> None:
                machine.now += machine.step(trainer.state.step, machine.now - began)
                update(trainer)

            patch.setattr(Trainer, "update", costly)
            patch.setattr(Trainer, "save", machine.spends("saving", Trainer.save))
            patch.setattr(loop, "total_loss", machine.spends("evaluation", loop.total_loss))
            patch.setattr(clock, "BESIDE_SECONDS", 1.5)  # this machine draws and saves faster than most
            foreseen = 0.9 * machine.evaluation  # a tenth too low
            patch.setattr(Trainer, "foreseen_evaluation", lambda trainer: foreseen)
            patch.setattr(Writer, "write", machine.spends("sample", Writer.write))
            run = act(*arguments, **options)
        return run, machine.now - began + clock.EXIT_SECONDS

    return act_on


def steady(seconds: float) -> Cost:
    return lambda step, now: seconds


def decisions(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "decisions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("minutes", "machine"),
    {
        "usual": (2.0, Machine(steady(0.4))),
        "quick": (0.5, Machine(steady(0.1), evaluation=0.2)),
        "few steps": (2.0, Machine(steady(5.0), evaluation=9.0)),
        "costly evaluations": (2.0, Machine(steady(0.5), evaluation=9.0)),
        "one evaluation": (1.0, Machine(steady(0.3), evaluation=15.0, sample=2.0)),
        "slow to start": (1.0, Machine(lambda step, now: 0.3 if step else 6.0)),
        "uneven": (2.0, Machine(lambda step, now: 0.2 + 0.6 * (step % 3 == 0))),
        "slower by and by": (2.0, Machine(lambda step, now: 0.3 + 0.004 * now)),
        "faster from the middle on": (2.0, Machine(lambda step, now: 0.6 if now < 60 else 0.3)),
        "twice as slow from the middle on": (2.0, Machine(lambda step, now: 0.3 if now < 60 else 0.6)),
    }.values(),
    ids=["usual", "quick", "few steps", "costly evaluations", "one evaluation", "slow to start", "uneven",
         "slower by and by", "faster from the middle on", "twice as slow from the middle on"],
)  # fmt: skip
def test_minutes_are_met(lab, on, minutes, machine):
    run, seconds = on(machine, lab.train, "run", minutes=minutes)
    assert abs(seconds - 60 * minutes) <= max(3.0, 0.05 * 60 * minutes)
    state = run.checkpoint().state
    assert state["finished"] and state["progress"] == pytest.approx(1.0)
    assert run.metrics()[-1]["step"] == state["step"] and "validation_loss" in run.metrics()[-1]


def test_the_schedule_ends_when_the_time_does(lab, on):
    run, _ = on(Machine(steady(0.4)), lab.train, "run", minutes=2, schedule="linear", decay_floor=0.0)
    rates = [line["learning_rate"] for line in run.metrics()]
    assert rates[-1] == pytest.approx(0, abs=0.02 * max(rates))
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_the_decisions_are_on_record(lab, on):
    run, _ = on(Machine(steady(0.4), evaluation=0.5), lab.train, "run", minutes=2)
    record = decisions(run)
    evaluated = [line["step"] for line in run.metrics() if "validation_loss" in line]
    assert 3 <= len(evaluated) <= clock.EVALUATIONS + 1
    assert {line["step"] for line in record} >= set(evaluated[:-1])
    steps, progress = ([line[name] for line in record] for name in ("step", "progress"))
    assert steps == sorted(set(steps)) and progress == sorted(progress)


def test_a_machine_that_stalls_is_cut_off_in_time_and_keeps_its_best(lab, on):
    stalling = Machine(lambda step, now: 0.4 if now < 80 else 8.0)
    run, seconds = on(stalling, lab.train, "run", minutes=2)
    assert 120 - 8 < seconds < 120 + 8 + 3  # no closer than a step
    assert run.checkpoint().state["finished"]
    assert run.metrics()[-1]["validation_loss"] > 0
    repeated, _ = on(Machine(steady(0.1)), lab.train, "again", minutes=2, decisions=str(run.path / "decisions.jsonl"))
    lab.assert_same(repeated, run)  # cut off at the same step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_given_its_decisions_a_run_is_repeated_bit_for_bit(lab, on, optimizer):
    settings = {"minutes": 1, "optimizer": optimizer, "accumulation_steps": 2}
    uneven = Machine(lambda step, now: 0.2 + 0.6 * (step % 3 == 0))
    run, _ = on(uneven, lab.train, "run", **settings)
    other, _ = on(Machine(steady(0.9)), lab.train, "other", **settings)
    assert lab.timeless(other) != lab.timeless(run)  # another clock gives another run
    record = str(run.path / "decisions.jsonl")
    repeated, _ = on(Machine(steady(0.9), evaluation=5.0), lab.train, "repeated", decisions=record, **settings)
    lab.assert_same(repeated, run)
    assert decisions(repeated) == decisions(run)


def test_the_stages_of_a_curriculum_follow_the_clock_and_its_record(lab, on, monkeypatch):
    contexts, update = [], Trainer.update
    monkeypatch.setattr(
        Trainer, "update", lambda trainer: update(trainer) or contexts.append(trainer.batches.context_length)
    )
    settings = {"minutes": 1, "curriculum": ("1:4", "1:8", "1:")}
    run, seconds = on(Machine(steady(0.4)), lab.train, "run", **settings)
    assert abs(seconds - 60) <= 3
    first = list(contexts)
    assert first == sorted(first)
    shares = [first.count(context) / len(first) for context in (4, 8, 16)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)
    contexts.clear()
    on(Machine(steady(0.9)), lab.killed, len(first) // 2, lab.train, "repeated", **settings,
       decisions=str(run.path / "decisions.jsonl"))  # fmt: skip
    repeated, _ = on(Machine(steady(0.9)), resume, lab.folder / "repeated")
    lab.assert_same(repeated, run)


def test_a_killed_run_keeps_to_the_decisions_it_had_made(lab, on):
    straight, _ = on(Machine(steady(0.4)), lab.train, "straight", minutes=1)
    evaluated = [line["step"] for line in straight.metrics() if "validation_loss" in line]
    step = next(line["step"] for line in decisions(straight)[2:] if line["step"] not in evaluated)
    on(Machine(steady(0.4)), lab.killed, step + 1, lab.train, "run", minutes=1)
    made = decisions(Run(lab.folder / "run"))
    assert made[-1]["step"] == step > Run(lab.folder / "run").checkpoint().state["step"]  # it is to be met again
    run, _ = on(Machine(steady(0.25)), resume, lab.folder / "run")
    assert decisions(run)[: len(made)] == made and len(decisions(run)) > len(made)
    record = str(run.path / "decisions.jsonl")
    repeated, _ = on(Machine(steady(0.4)), lab.train, "repeated", minutes=1, decisions=record)
    lab.assert_same(repeated, run)


@pytest.mark.parametrize("step", [3, 40, 100])
def test_a_resumed_run_takes_the_time_that_was_left(lab, on, step):
    machine = Machine(steady(0.4))
    on(machine, lab.killed, step, lab.train, "run", minutes=1)
    kept = (Run(lab.folder / "run").checkpoint() or None) and Run(lab.folder / "run").checkpoint().state["seconds"]
    machine.now += 1000  # nobody was training
    _, seconds = on(machine, resume, lab.folder / "run")
    assert abs((kept or 0.0) + seconds - 60) <= 3


def test_a_finished_run_trains_on_for_more_minutes(lab, on):
    machine = Machine(steady(0.4))
    run, _ = on(machine, lab.train, "run", steps=20)
    resumed, seconds = on(machine, resume, run, minutes=1)
    assert abs(seconds - 60) <= 3
    again, seconds = on(machine, resume, run, minutes=0.5)
    assert abs(seconds - 30) <= 3
    assert again.checkpoint().state["finished"] and again.metrics()[-1]["step"] > resumed.metrics()[1]["step"]
    assert (run.path / "loss.png").exists()
    on(machine, resume, run, minutes=0.2)
    assert not (run.path / "loss.png").exists(), "it has no time for a picture, and an old one would be untrue"


def test_a_line_that_a_full_disk_cut_short_is_left_out(lab, on):
    machine = Machine(steady(0.4))
    on(machine, lab.killed, 70, lab.train, "run", minutes=1)
    record = lab.folder / "run" / "decisions.jsonl"
    whole = record.read_bytes()
    record.write_bytes(whole + b'{"step": 7')
    run, _ = on(machine, resume, lab.folder / "run")
    assert record.read_bytes().startswith(whole)
    assert decisions(run)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ('{"steps": 3}\n', "does not hold the decisions"),
        ('{"step": 3, "pace": 1}\n', "does not hold the decisions"),
        ("step 3\n", "line 1 is not JSON"),
    ],
)
def test_decisions_that_are_none_are_refused_before_anything_is_made(lab, content, says):
    path = lab.folder / "decisions.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says):
        lab.train("run", minutes=1, decisions=str(path))
    assert not (lab.folder / "run").exists()
