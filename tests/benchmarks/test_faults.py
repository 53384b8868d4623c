"""A sample of the campaign of benchmarks/faults.py, and proof that it would notice harm."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quire import checkpoint, files

PATH = Path(__file__).parents[2] / "benchmarks" / "faults.py"
spec = importlib.util.spec_from_file_location("faults", PATH)
assert spec is not None and spec.loader is not None
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)


@pytest.fixture
def run(tmp_path, monkeypatch):
    from quire.training import journal

    monkeypatch.setattr(files, "_sync", lambda path: None)
    monkeypatch.setattr(journal, "plot_losses", lambda *arguments: None)
    return faults.tiny_run(tmp_path)


def test_no_flip_or_truncation_is_loaded(run):
    last = run.folder("last")
    figures = {"flips": faults.flips(last, 200), "truncations": faults.truncations(last, 200)}
    figures["run flips"] = faults.run_flips(run, 50)
    assert [found["tried"] for found in figures.values()] == [200] * 3
    assert figures["flips"]["in_a_tensor"] > 50
    assert faults.harm(figures) == 0, figures


def test_a_full_disk_destroys_nothing(run):
    found = faults.full_disk(run)
    assert found["failures"] >= 14
    assert faults.harm({"full disk": found}) == 0, found


def test_a_loader_that_checks_less_would_be_found_out(run, monkeypatch):
    monkeypatch.setattr(files, "crc32_of", lambda path: "")
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path, expected: {})
    assert faults.flips(run.folder("last"), 30)["loaded"] > 10


def test_a_writer_that_writes_in_place_would_be_found_out(run, monkeypatch):
    def in_place(path, writer):
        for old in path.iterdir():
            files.operation("remove", old)
            old.unlink()
        writer(path)

    monkeypatch.setattr(files, "replace_folder", in_place)
    assert faults.full_disk(run)["unusable"] > 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_kills_while_saving(tmp_path):
    """In a process of its own, since a process with threads had better not fork."""
    command = [sys.executable, str(PATH), "--kills=5", "--flips=4", "--truncations=4", f"--json={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults did harm" in done.stdout and "5 kills" in done.stdout
    assert (tmp_path / "out").exists()
