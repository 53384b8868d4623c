"""The sweep's arithmetic, on cells made up here."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("sweep", FOLDER / "sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sweep", module)
    spec.loader.exec_module(module)
    return module


def line(text: str, size: int, minutes: float, recipe: str, bits: float, **more: object) -> dict:
    counted = [3.2, 2.8, 2.5, 2.4, 2.3 + 0.1 * len(text)]
    return {"text": text, "bytes": size, "minutes": minutes, "recipe": recipe, "bits_per_byte": bits,
            "training_bytes": size, "counted": counted, "pilot": 2.6 + 0.3 * len(text),
            "steps": round(6000 * minutes), **more}  # fmt: skip


def test_every_cell_comes_once_the_short_ones_first(sweep: ModuleType) -> None:
    found = list(sweep.cells(sweep.MINUTES, ["modern", "ngram"], sweep.SIZES))
    assert len({sweep.key(cell) for cell in found}) == len(found)
    minutes = [cell["minutes"] for cell in found]
    assert minutes == sorted(minutes) and set(minutes) == set(sweep.MINUTES)
    assert {cell["bytes"] for cell in found} == set(sweep.SIZES)
    assert {cell["text"] for cell in found} <= set(sweep.TEXTS)


def test_the_regression_finds_the_law_that_cells_follow(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "PENALTY", 1e-9)

    def law(seconds: float, size: int, harder: float) -> float:
        return 0.4 - 0.12 * math.log(seconds) - 0.02 * math.log(size) + 0.3 * harder - 0.03 * math.log(seconds) * harder

    def harder(cell: dict) -> float:
        return math.log(cell["pilot"] / min(cell["counted"]))

    cells = []
    for text in ("a", "bb", "ccc"):
        for size in (20_000, 200_000, 1_000_000):
            for minutes in (0.25, 1, 3, 10):
                cell = line(text, size, minutes, "r", 0.0)
                bits = min(cell["counted"]) * math.exp(law(60 * minutes, size, harder(cell)))
                cells.append({**cell, "bits_per_byte": bits})
    found = sweep.regression("modern", cells, {"r": 0.01})
    assert found["deviation"] < 1e-3 and found["core_seconds"] == [15, 600]
    inputs = sweep.features("modern", 120, 500_000, cells[0]["counted"], cells[0]["pilot"])
    expected = law(120, 500_000, harder(cells[0]))
    assert float(inputs @ np.array(found["coefficients"])) == pytest.approx(expected, abs=1e-3)


def test_the_winner_is_best_on_the_average_text(sweep: ModuleType) -> None:
    group = [line("a", 1, 1, "small", 2.0), line("a", 1, 1, "large", 2.2),
             line("b", 1, 1, "small", 3.1), line("b", 1, 1, "large", 3.0)]  # fmt: skip
    assert sweep.winner(group) == (1, "small")
    easy = line("a", 1, 1, "on the easy text alone", 2.1)
    assert sweep.winner([*group, easy]) == (1, "small")
    assert sweep.winner([*group, {**easy, "bits_per_byte": 1.9}]) == (1, easy["recipe"])
    assert sweep.winner([line("b", 1, 1, "alone", 3.0)]) == (1, "alone")


@pytest.mark.parametrize(("bits", "minutes"), [(1.5, 3), (1.601, 3), (1.7, 1)])
def test_less_time_wins_only_where_it_is_clearly_better(sweep: ModuleType, bits: float, minutes: float) -> None:
    group = [line("a", 1, 1, "r", 1.6), line("b", 1, 1, "r", 2.6), line("a", 1, 3, "r", bits)]
    assert sweep.winner(group) == (minutes, "r")
    assert (group[2] in sweep.unspoilt(group)) == (minutes == 3)
