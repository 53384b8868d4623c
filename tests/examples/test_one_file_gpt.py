"""The GPT in one file: its loss, logits, gradients and steps beside the library's model and torch's optimizer."""

import ast
import importlib.util
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.evaluation.loss import total_loss
from quire.generation.sampling import SamplingSettings, sample
from quire.generation.stream import tokens
from quire.models.gpt import GPT, GPTSettings

PATH = Path(__file__).parents[2] / "examples" / "one_file_gpt.py"
SHAPE = {"vocabulary_size": 13, "context_length": 10, "embedding_size": 24, "layers": 3, "heads": 4}
CPU = torch.device("cpu")
VERSE = "The owl that calls upon the night\nspeaks the unbeliever's fright. O wake,\n" * 20


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The file, imported; it turns autograd off for good, which here ends with the test. In float64."""
    spec = importlib.util.spec_from_file_location("one_file_gpt", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with torch.enable_grad():
        spec.loader.exec_module(module)
        assert not torch.is_grad_enabled()
        torch.set_default_dtype(torch.float64)
        yield module
        torch.set_default_dtype(torch.float32)


def library_model(model: Any) -> tuple[GPT, list[tuple[str, Tensor, Tensor]]]:
    """Quire's GPT with the weights of the file's, and each of its parameters by name, value and gradient; the three
    maps that the file has side by side are taken apart, and its matrices turned."""
    pieces = {"token_embedding.weight": model.characters, "positions.weight": model.places}
    pieces |= {"norm.weight": model.norm[0], "norm.bias": model.norm[1]}
    found = [(name, p.value, p.grad) for name, p in pieces.items()]
    for number, w in enumerate(model.blocks):
        for own, theirs in {"norm 1": "attention_norm", "norm 2": "feedforward_norm"}.items():
            for p, kind in zip(w[own], ("weight", "bias"), strict=True):
                found.append((f"blocks.{number}.{theirs}.{kind}", p.value, p.grad))
        maps = {"out": ["attention.output"], "up": ["feedforward.up"], "down": ["feedforward.down"]}
        maps["qkv"] = ["attention.query", "attention.key", "attention.value"]
        for own, names in maps.items():
            for p, kind in zip(w[own], ("weight", "bias"), strict=True):
                values, grads = (x.transpose(0, -1).chunk(len(names)) for x in (p.value, p.grad))
                parts = zip(names, values, grads, strict=True)
                found += [(f"blocks.{number}.{name}.{kind}", value, grad) for name, value, grad in parts]
    theirs = GPT(GPTSettings(**SHAPE)).double().eval()
    parameters = dict(theirs.named_parameters())
    assert {name for name, _, _ in found} == parameters.keys()
    for name, value, _ in found:
        parameters[name].data.copy_(value)
    return theirs, found


def random_model(example: ModuleType, size: float = 1 / 3) -> Any:
    """All weights, biases and norms too, are random numbers large enough for every term to count."""
    torch.manual_seed(3)
    model = example.GPT(*SHAPE.values())
    for p in model.parameters:
        p.value.copy_(torch.randn(p.value.shape) * size)
    return model


def test_loss_logits_and_every_gradient_are_the_library_s(example):
    """With tokens that occur many times, and a window shorter than the context; a second batch adds to the first."""
    model = random_model(example)
    theirs, found = library_model(model)
    for number in range(2):
        inputs, targets = torch.randint(7, (2, 5, 8 + number))
        logits, model_back = model(inputs)
        loss, loss_back = example.cross_entropy(logits, targets)
        model_back(loss_back())
        with torch.enable_grad():
            expected = theirs(inputs, targets)
            expected.backward()
        torch.testing.assert_close(logits, theirs(inputs).detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-10)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, _, grad in found:
        # A key's bias adds the same to all scores of a row, which softmax does not notice: that gradient is 0.
        assert name.endswith("key.bias") or gradients[name].abs().max() > 1e-4, name
        torch.testing.assert_close(grad, gradients[name], rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_ten_steps_are_torch_s_adamw_with_clipping(example):
    """Matrices decay and vectors do not; the gradients of the first steps are clipped."""
    model = random_model(example, 0.6)
    theirs, _ = library_model(model)
    matrices, vectors = ([p for p in theirs.parameters() if (p.dim() >= 2) == two] for two in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99))
    norms = []
    for step in range(1, 11):
        inputs, targets = torch.randint(13, (2, 4, 10))
        rate = example.learning_rate(step, 10, 1e-2)
        example.train_step(model, inputs, targets, step, rate)
        with torch.enable_grad():
            theirs(inputs, targets).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    assert max(norms) > 1
    parameters = dict(theirs.named_parameters())
    for name, value, _ in library_model(model)[1]:
        torch.testing.assert_close(value, parameters[name].detach(), rtol=0, atol=1e-10)


def test_the_learning_rate_rises_and_falls(example):
    rates = [example.learning_rate(step, 1000, 2.0) for step in range(1, 1001)]
    assert rates[0] == pytest.approx(2 / 51) and max(rates) == rates[50] == 2 and rates[-1] == pytest.approx(0.2)
    assert rates[51:] == sorted(rates[51:], reverse=True)
    assert rates[525] == pytest.approx(1.1, abs=0.01)
    assert example.learning_rate(1, 1, 2.0) > 0


@pytest.mark.parametrize("length", [2, 10, 11, 12, 700])
def test_the_held_out_loss_is_the_library_s(example, length):
    """Over all of a text that does not come out even, and one shorter than a window."""
    model = random_model(example)
    text = torch.randint(13, (length,))
    total, count = total_loss(library_model(model)[0], text.numpy(), 10, 13, CPU)
    assert count == length - 1
    assert example.held_out_loss(model, text) == pytest.approx(total / count, abs=1e-10)


@pytest.mark.parametrize("start", [1, 4])
def test_greedy_writing_is_the_library_s(example, start):
    model = random_model(example)
    prompt = torch.randint(13, (start,))

    def likeliest(logits: Tensor, windows: list[list[int]]) -> list[int]:
        return [sample(row, [], SamplingSettings(temperature=0), torch.Generator()) for row in logits]

    most = 11 - start  # beyond the context the library reads the last half of it anew, the file all of it
    stream = tokens(library_model(model)[0], [prompt.tolist()], likeliest, CPU)
    written = [chosen for (chosen,) in islice(stream, most)]
    assert example.write(model, prompt, most, temperature=0).tolist() == [*prompt.tolist(), *written]
    assert len(example.write(model, prompt, 30, temperature=0)) == start + 30


def test_what_is_drawn_has_the_library_s_chances(example):
    """Temperature and top-k shape the chances as they do in the library; drawn 4000 times at once by a stand-in."""
    logits = torch.randn(13) * 2
    model = type("Still", (), {"context_length": 10, "__call__": lambda self, x: (logits.expand(1, 1, -1), None)})()
    torch.manual_seed(5)
    drawn = example.write(model, torch.tensor([0]), 4000, temperature=1.7, top_k=5)[1:]
    kept = (logits / 1.7).topk(5)
    chances = torch.zeros(13).scatter(0, kept.indices, torch.softmax(kept.values, 0))
    shares = torch.bincount(drawn, minlength=13) / 4000
    assert (shares[chances == 0] == 0).all()
    assert (shares - chances).abs().max() < 4 * 0.5 / math.sqrt(4000)


# ---- the file itself ----


def test_it_is_one_short_file_without_autograd_or_quire():
    source = PATH.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 300
    names, imported = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    assert imported <= {"torch", *sys.stdlib_module_names}
    forbidden = {"nn", "autograd", "optim", "backward", "requires_grad", "requires_grad_", "functional", "softmax",
                 "log_softmax", "layer_norm", "gelu", "cross_entropy", "native_layer_norm", "enable_grad", "func",
                 "compile"}  # fmt: skip
    assert not names & forbidden
    assert "torch.set_grad_enabled(False)" in source


# ---- the program ----


SMALL = shlex.split("--layers 1 --heads 2 --embedding-size 16 --context-length 16 --batch-size 8 --tokens 20")


def test_it_runs_as_a_script(tmp_path):
    (tmp_path / "verse.txt").write_text(VERSE)
    command = [sys.executable, str(PATH), "verse.txt", *SMALL, "--steps", "2"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=100)
    assert said.returncode == 0, said.stderr
    assert "step 2: loss" in said.stdout and "\n\nT" in said.stdout


def test_it_trains_and_writes(tmp_path, example, monkeypatch, capsys):
    """The loss falls, the held-out loss is near it, the text begins with the prompt; the same seed gives the same."""
    (tmp_path / "verse.txt").write_text(VERSE)
    words = ["verse.txt", *SMALL, "--steps", "60", "--learning-rate", "0.01", "--prompt", "The owl"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["one_file_gpt.py", *words])
    said = []
    for _ in range(2):
        example.main()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", said[0])]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.5
    held_out = float(re.findall(r"held out: (\d+\.\d+)", said[0])[0])
    assert abs(held_out - losses[-1]) < 0.5
    assert len(said[0].split("\n\nThe owl")[1]) == 21


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.txt"], "No such file"),
        (["."], "."),
        (["empty.txt"], "fewer than 148 characters"),
        (["short.txt"], "fewer than 148 characters"),
        (["binary.bin"], "binary.bin is not UTF-8 text"),
        (["latin.txt"], "latin.txt is not UTF-8 text"),
        (["verse.txt", "--heads", "3"], "--embedding-size must be a multiple of --heads"),
        (["verse.txt", "--heads", "0"], "--heads must be at least 1"),
        (["verse.txt", "--steps", "-1"], "steps must be at least 1"),
        (["verse.txt", "--temperature", "nan"], "temperature must be"),
        (["verse.txt", "--steps", "many"], "invalid int value"),
        (["verse.txt", "--prompt", "Zo\u00eb"], "'Z', '\u00eb'"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(tmp_path, words, says, example, monkeypatch, capsys):
    files = {"empty.txt": b"", "short.txt": b"short", "binary.bin": b"\0" * 999, "verse.txt": VERSE.encode()}
    files["latin.txt"] = "Zo\u00eb".encode("latin-1") * 99
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["one_file_gpt.py", *words])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
