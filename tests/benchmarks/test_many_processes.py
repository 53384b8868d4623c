"""docs/many-machines.md has the tables that benchmarks/many_processes.py made of its results."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")
KEPT: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "many_processes.json").read_text())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("many_processes", ROOT / "benchmarks" / "many_processes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_results(script):
    assert "\n".join(script.equality_table(KEPT["agree"]["differences"])) in PAGE
    assert "\n".join(script.scaling_table(KEPT["scaling"])) in PAGE
    assert "\n".join(script.checkpoint_table(KEPT["checkpoint"])) in PAGE


def test_what_the_page_says_of_them_holds():
    """One to four processes agree to 1e-5 in every way; ten kills cost nothing."""
    assert all(len(each) == 4 and max(each) < 1e-5 for each in KEPT["agree"]["differences"].values())
    assert KEPT["agree"]["same_parameters"]
    for parallel in ("ddp", "fsdp"):
        found = KEPT["kills"][parallel]
        assert found["kills"] == len(found["killed"]) == 10 and found["same_curve"] and found["same_weights"]
