"""docs/from-scratch.md: its configuration trains, its commands work, its tests exist."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

from quire import files
from quire.cli.main import call
from quire.models.stack import STACK, StackSettings
from quire.run import Run, empty_model
from quire.training import journal

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "from-scratch.md").read_text(encoding="utf-8")
VERSE = "Nemo, the owl that calls upon the night, speaks the unbeliever's fright. "


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page speaks of; its model is made small."""
    (text,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for large, small in (("= 512", "= 16"), ("= 196", "= 12"), ("steps = 500000", "steps = 4"), ("= 1000", "= 10")):
        assert large in text
        text = text.replace(large, small)
    block = re.findall(r"^    \{ kind = \"block\".*\n", text, re.MULTILINE)
    (tmp_path / "theirs.toml").write_text(text.replace("".join(block), "".join(block[:2])))
    (tmp_path / "shakespeare.txt").write_text(VERSE * 40)
    (tmp_path / "verne.txt").write_text(VERSE[::-1] * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(journal, "plot_losses", lambda curves, axis, path: None)
    monkeypatch.setattr(files, "_sync", lambda path: None)
    return tmp_path


def test_every_command(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order, on few words; what is imported again writes what was exported."""
    (block,) = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    commands = [line for line in block.splitlines() if line.startswith("quire ")]
    assert len(commands) >= 9
    for command in commands:
        shorter = re.sub(r"--(steps|tokens) \d+", r"--\1 4", command)
        words = shlex.split(shorter, comments=True)[1:]
        words += ["--json", "--threads", "1"] if words[0] in ("train", "finetune") else []
        assert call(words + ["--json"] * (words[0] == "resume")) == 0, f"{command}\n{capsys.readouterr().err}"
    model = Run("runs/theirs").settings
    assert isinstance(model, StackSettings) and len(model.stack) == 5
    assert Run("runs/again").settings == model
    assert Run("runs/verne").config["training"]["learning_rate"] == pytest.approx(5e-5)


def test_its_configuration_has_the_sizes_of_theirs() -> None:
    """8 blocks of 512 with all biases: their number of weights, counted by hand, but for the head's bias."""
    table = tomllib.loads(re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0])
    settings = StackSettings(**{**table["model"], "vocabulary_size": 65})
    model = empty_model(settings, torch.device("cpu"))
    size, context, words = 512, 196, 65
    attention, feedforward, norm = 4 * (size * size + size), 2 * size * 4 * size + 5 * size, 2 * size
    blocks = 8 * (attention + feedforward + 2 * norm)
    assert sum(p.numel() for p in model.parameters()) == blocks + norm + 2 * words * size + context * size


def test_every_kind_and_test_that_it_names_is_there() -> None:
    for kind in re.findall(r"`(\w+(?:-\w+)*)`", PAGE.split("## The layers")[1].split("```toml")[0]):
        assert kind in STACK or kind in ("model_layers", "ReLU"), kind
    named = re.findall(r"\(\.\./(tests/[\w/]+\.py)\)`::(\w+)`", PAGE)
    assert len(named) >= 15
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"
