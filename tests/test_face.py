"""The ways in: `import quire`, `quire`, `python -m quire`; quick, and with the right settings before torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quire as face
from quire.cli.main import COMMANDS, HELP

HEAVY = ["torch", "numpy", "tyro", "rich", "matplotlib", "safetensors"]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)


def test_import_and_help_are_quick() -> None:
    """Nothing slow is imported by `import quire` or `quire --help`, and idle threads are told to sleep before torch."""
    done = python(
        "-c",
        "import json, os, sys, quire\n"
        "from quire.cli.main import call\n"
        "assert call(['--help']) == 0 and call(['--version']) == 0 and call(['trian']) == 2\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        "print(json.dumps([found, os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT']]))",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], "passive", "1000"]
    assert f"quire {face.__version__}" in done.stdout


def test_python_m_quire_is_the_command() -> None:
    done = python("-m", "quire", "--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, HELP, "")


def test_help_lists_every_command(quire) -> None:
    for word in ("--help", "-h", "help"):
        said = quire(word)
        assert said.code == 0 and said.out == HELP
    for name in COMMANDS:
        assert f"\n  {name} " in HELP
    assert max(map(len, HELP.splitlines())) <= 110


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    said = quire(command, "--help")
    assert said.code == 0 and said.err == ""
    assert said.out.startswith(f"usage: quire {command} ") and "(default: )" not in said.out
    assert "{None}" not in said.out


def test_the_documented_face() -> None:
    wanted = "Run ModelSettings TrainingSettings train resume generate evaluate load_tokenizer".split()  # noqa: SIM905
    wanted += "TOKENIZERS MODELS CORPORA PRESETS ENGINES OPTIMIZERS SCHEDULES".split()  # noqa: SIM905
    assert set(wanted) <= set(face.__all__)
    assert 15 <= len(face.__all__) <= 25


def test_training_and_writing_from_python(desk: Path) -> None:
    """The two lines of the module's docstring."""
    small = {"layers": 1, "heads": 2, "embedding_size": 16, "context_length": 32, "feedforward_size": 32}
    run = face.train("book.txt", run="small", steps=3, model=small, threads=1, device="cpu", batch_size=2)
    text = face.generate(run, prompt="The", tokens=5)[0].text
    assert len(text) == 5 and face.Run("small").settings.layers == 1
    assert [row["step"] for row in run.metrics()][-1] == 3
