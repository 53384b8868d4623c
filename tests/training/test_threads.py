"""The number of threads is found by measurement, recorded and kept; what other programs take is noticed."""

import dataclasses
import os
import subprocess
import sys
import time

import pytest
import torch

from quire.run import Run
from quire.training import threads
from quire.training.loop import Trainer
from quire.training.resume import resume
from quire.training.threads import Reading, Watch, judged, measured_threads, reading


@pytest.fixture(autouse=True)
def as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Steps:
    """Steps that cost so many seconds of a clock of their own by the number of threads, the first one more."""

    def __init__(self, monkeypatch, costs):
        self.costs, self.now, self.taken = costs, 0.0, 0
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)

    def __call__(self):
        self.now += self.costs[torch.get_num_threads()] * (1 + 2 * (self.taken == 0))
        self.taken += 1


@pytest.mark.parametrize(
    ("costs", "best"),
    [
        ({4: 0.3, 2: 0.5, 1: 0.9}, 4),
        ({4: 1.4, 2: 0.5, 1: 0.9}, 2),
        ({4: 1.4, 2: 0.9, 1: 0.2}, 1),
        ({2: 0.40, 1: 0.41}, 1),
    ],
)
def test_the_fastest_number_wins_and_the_smaller_of_two_equals(monkeypatch, costs, best):
    steps, before = Steps(monkeypatch, costs), torch.get_num_threads()
    found = measured_threads(steps, list(costs), 20.0)
    assert found.threads == best
    assert found.seconds == pytest.approx(costs)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("seconds", [0.5, 4.0, 9.0])
def test_measuring_keeps_to_its_time_and_without_a_round_takes_the_first(monkeypatch, seconds):
    steps = Steps(monkeypatch, {2: 1.0, 1: 0.5})
    found = measured_threads(steps, [2, 1], seconds)
    assert steps.now <= max(seconds, 3.0)  # the first step is always taken
    assert (found.threads, bool(found.seconds)) == ((2, False) if seconds < 9 else (1, True))
    assert measured_threads(steps, [2], seconds).threads == 2


# ---- in a training ------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch):
    """Trainings of any length try one thread and two; one is the faster, whatever the clock says."""

    def measure(step, candidates, seconds):
        for count in (2, 1, 2, 1):
            torch.set_num_threads(count)
            step()
        return threads.Measured(1, {2: 0.2, 1: 0.1})

    monkeypatch.setattr(threads, "measured_threads", measure)
    monkeypatch.setattr(threads, "TRIED_SECONDS", 0.0)


@pytest.mark.parametrize("settings", [{"optimizer": "muon"}, {"engine": "manual", "curriculum": ("1:8", "1:16")}])
def test_the_trial_leaves_no_trace(lab, tried, settings):
    """A run that measured, and one that repeats its decisions and does not measure, are the same bit for bit."""
    settings = {"minutes": 0.04, "sample_tokens": 20, **settings}
    run = lab.train("run", threads=0, **settings)
    assert run.config["training"]["threads"] == Run(run.path).config["training"]["threads"] == 1
    assert run.manifest["seconds_a_step_by_threads"] == {"2": 0.2, "1": 0.1} and run.manifest["threads"] == 1
    record = str(run.path / "decisions.jsonl")
    repeated = lab.train("repeated", threads=0, decisions=record, **settings)
    assert "seconds_a_step_by_threads" not in repeated.manifest and repeated.manifest["threads"] == 1
    lab.assert_same(repeated, run)


def test_a_resumed_run_keeps_its_threads(lab, tried, monkeypatch):
    lab.killed(4, lab.train, "run", threads=0, minutes=0.06)  # after the trial's four steps
    seen, update = set(), Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda trainer: seen.add(torch.get_num_threads()) or update(trainer))
    torch.set_num_threads(2)
    resume(lab.folder / "run")
    assert seen == {1}


def test_a_run_of_steps_and_one_of_given_threads_measure_nothing(lab, tried):
    assert "seconds_a_step_by_threads" not in lab.train("steps", threads=0, steps=3).manifest
    assert "seconds_a_step_by_threads" not in lab.train("given", threads=2, minutes=0.02).manifest


# ---- contention ---------------------------------------------------------------------------------------------------

IDLE = Reading(now=100.0, own=10.0, waited=0.0, busy=50.0, throttled=0.0)


def after(**more: float) -> Reading:
    return dataclasses.replace(IDLE, **{name: getattr(IDLE, name) + value for name, value in more.items()})


@pytest.mark.parametrize(
    ("then", "says"),
    [
        (after(now=10, own=19, waited=0.3, busy=19.5), None),
        (after(now=10, own=10, waited=0.1, busy=20), None),  # the other core's business
        (
            after(now=10, own=10, waited=10, busy=20),
            "about 50% of this machine: training takes about 2.0 times",
        ),
        (after(now=10, own=4, waited=14, busy=20), "about 80% of this machine: training takes about 4.5 times"),
        (after(now=10, own=5, waited=0, busy=20, throttled=5), "quota of processor time for 50% of the time"),
    ],
)
def test_what_others_take_and_what_it_costs(then, says):
    sentence = judged(IDLE, then, cores=2)
    assert sentence is None if says is None else says in sentence


@pytest.mark.skipif(reading() is None, reason="needs Linux's /proc")
def test_a_program_beside_is_noticed_once(monkeypatch):
    monkeypatch.setattr(threads, "WATCHED_SECONDS", 0.5)
    cores = len(os.sched_getaffinity(0))
    program = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    beside = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3 * cores)]
    try:
        time.sleep(0.5)
        watch, end = Watch(), time.monotonic() + 10
        while not (sentence := watch.sentence()) and time.monotonic() < end:
            sum(range(100_000))
        assert sentence and "Other programs use about" in sentence
        assert watch.sentence() is None
    finally:
        for process in beside:
            process.kill()
            process.wait()


def test_without_proc_nothing_is_said(monkeypatch):
    monkeypatch.setattr(threads, "reading", lambda: None)
    assert Watch().sentence() is None
