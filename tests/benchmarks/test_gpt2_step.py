"""benchmarks/gpt2_step.py with a tiny model: the contenders take their steps, and rows are resumed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "gpt2_step.py"
sys.path.insert(0, str(PATH.parent))  # the scripts find each other in their own folder
spec = importlib.util.spec_from_file_location("gpt2_step", PATH)
assert spec is not None and spec.loader is not None
gpt2_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpt2_step)

SIZES = {"vocabulary": 1100, "layers": 1, "heads": 2, "channels": 16}
WORDS = ["--shape", "2", "8", "--model", json.dumps(SIZES), "--threads", "1", "--steps", "1"]


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, str(PATH), *WORDS, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rows_are_measured_once(tmp_path):
    pytest.importorskip("transformers", reason="the peer is not installed")
    contenders = ["Quire, eager", "Quire, manual", "transformers"]
    out, only = tmp_path / "found.json", ["--only", *contenders]
    shown = run("--rounds", "1", "--json", str(out), *only)
    first = json.loads(out.read_text())["cells"]
    assert set(first) == {f"1, {name}" for name in contenders}
    assert all(cell["tokens_per_second"] > 0 and cell["peak_gflops"] > 0 for cell in first.values())
    assert first["1, Quire, eager"]["loss"] == pytest.approx(first["1, Quire, manual"]["loss"], abs=1e-3)
    assert "Quire, manual" in shown
    run("--rounds", "1", "--json", str(out), *only)
    assert json.loads(out.read_text())["cells"] == first
