"""The drill of benchmarks/bad_layers.py: two ways to break each gradient, each in the smallest model that shows it."""

import importlib.util
import sys
from pathlib import Path

import pytest

from quire.inspection import gradients as inspected
from quire.inspection import undoing
from quire.layers.linear import Linear

PATH = Path(__file__).parents[2] / "benchmarks" / "bad_layers.py"
spec = importlib.util.spec_from_file_location("bad_layers", PATH)
assert spec is not None and spec.loader is not None
bad_layers = importlib.util.module_from_spec(spec)
sys.modules["bad_layers"] = bad_layers  # where its dataclasses look for their module
spec.loader.exec_module(bad_layers)

MUTANTS = bad_layers.mutants()
FIRST, LAST = {mutant.name: mutant for mutant in reversed(MUTANTS)}, {mutant.name: mutant for mutant in MUTANTS}


@pytest.fixture(scope="module")
def trials():
    return bad_layers.trials()


def test_every_broken_layer_is_named(trials):
    for mutant in dict.fromkeys([*FIRST.values(), *LAST.values()]):
        where = f"quire/{mutant.file}:{mutant.lines[0]}: {mutant.name}: {mutant.what}"
        verdict = "never run"
        for trial in filter(lambda trial, mutant=mutant: trial.runs(mutant), trials):
            verdict = bad_layers.verdict(mutant, trial)
            if verdict != "missed":  # as it is where one line has several ways through it
                break
        assert verdict == "named", where


def test_every_gradient_is_broken_and_put_back(trials):
    names = {mutant.name for mutant in MUTANTS}
    assert {"RNN.step_back", "LSTM.step_back", "GRU.step_back", "PreNormBlock.undo_add", "Decoder.backward"} <= names
    without_a_sign = {"SinusoidalPositions.backward", "Curve.trace"}  # they have nothing to do
    for file, owner, function in bad_layers.gradients():
        assert f"{owner}.{function}" in names | without_a_sign, file
    assert {(mutant.name, mutant.what) for mutant in MUTANTS} >= bad_layers.VALUE_TOO, "no longer there"
    assert not trials[0].pass_().wrong
    before = Linear.backward.__code__
    with pytest.raises(KeyError), FIRST["Linear.backward"].in_place():
        assert Linear.backward.__code__ is not before
        raise KeyError
    assert Linear.backward.__code__ is before


def test_a_checker_that_checks_less_would_be_found_out(trials, monkeypatch):
    monkeypatch.setattr(undoing, "compare", lambda *arguments: None)
    mutant = FIRST["ReLU.backward"]
    trial = next(trial for trial in trials if trial.runs(mutant))
    assert bad_layers.verdict(mutant, trial) == "missed"


def test_a_checker_that_blames_others_would_be_found_out(trials, monkeypatch):
    monkeypatch.setattr(inspected, "WITHIN", inspected.WRONG)
    mutant = FIRST["ReLU.backward"]
    trial = next(trial for trial in trials if trial.runs(mutant))
    assert bad_layers.verdict(mutant, trial) == "blamed Part, Stack"
