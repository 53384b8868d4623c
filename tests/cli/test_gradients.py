"""quire gradients as a person and a program see it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from torch import Tensor

from quire import files
from quire.cli import gradients as command
from quire.layers.blocks import PreNormBlock
from quire.layers.normalization import LayerNorm
from quire.models import build_model
from quire.run import Run

EVERYTHING = 7 + 15  # calls of a gpt of one block


def test_the_table_and_the_page(tiny: Run, quire) -> None:
    said = quire("gradients", "tiny", "--prompt", "The owl calls")
    assert said.code == 0, said.err
    assert said.out.startswith("tiny: gpt, 12 tokens foreseen, loss ")
    table, equations, ending = re.fullmatch(r"[^\n]+\n\n(.*)\n\n(.*)\n\n(.*)\n", said.out, re.S).groups()  # type: ignore[union-attr]
    head, *rows = table.splitlines()
    assert head.split() == ["call", "output", "|output|", "|grad|", "autograd", "finite", "verdict"]
    assert len(rows) == EVERYTHING and all(row.endswith("  agrees") for row in rows)
    assert max(map(len, rows)) <= 110 and rows[0].startswith("(model): GPT")
    indent = {row.split(":")[0].strip(): len(row) - len(row.lstrip()) for row in rows}
    assert (indent["blocks.0"], indent["attention"], indent["query"], indent["attend"]) == (2, 4, 6, 6)
    assert re.search(r"(?m)^  LayerNorm: y = \(x - mean\).*\n      \S*normalization.py:\d+$", equations)
    assert re.fullmatch(rf"All {EVERYTHING} calls agree: with autograd within .* \(at most 1e-06\)\.", ending)
    assert "tiny/gradients.html" in said.plain
    page = Path("tiny/gradients.html").read_text(encoding="utf-8")
    assert "blocks.0.attention.query" in page and "dL/dW = sum over rows of grad^T x" in page
    assert quire("generate", "tiny", "--prompt", "The", "--tokens", "3").code == 0, "the run is as usable as before"


def test_json(tiny: Run, quire) -> None:
    said = quire("gradients", "tiny", "--prompt", "The owl", "--out", "page.html", "--json", "--each")
    assert said.code == 0 and said.out.count("\n") == 1
    found = json.loads(said.out)
    assert list(found) == [
        "run", "page", "loss", "gradient_norm", "source", "tokens", "left_out", "autograd_difference",
        "numerical_difference", "agree", "wrong", "calls",
    ]  # fmt: skip
    assert found["tokens"] == list("The owl") and found["agree"] and found["wrong"] == []
    assert found["page"] == "page.html" and Path("page.html").is_file() and not Path("tiny/gradients.html").exists()
    assert 0 <= found["autograd_difference"] < 1e-10 and 0 < found["numerical_difference"] < 1e-6
    assert len(found["calls"]) == EVERYTHING
    for number, call in enumerate(found["calls"]):
        assert call["number"] == number and call["verdict"] == "agrees" and call["equation"]
        assert call["activation_norm"] > 0 and call["gradient_norm"] > 0
        assert max(part["autograd"] for part in call["apart"]) == call["autograd_difference"]
    query = next(call for call in found["calls"] if call["name"] == "blocks.0.attention.query")
    assert query["layer"] == "Linear" and query["inputs"] == [[1, 6, 16]] and query["outputs"] == [[1, 6, 16]]
    assert [part["name"] for part in query["apart"]] == ["input", "weight", "bias"]
    assert [row["name"] for row in query["parameters"]] == ["weight", "bias"]


def test_a_broken_backward_is_named_with_its_place(tiny: Run, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LayerNorm.backward

    def backward(self: LayerNorm, grad: Tensor) -> Tensor:
        return -right(self, grad)

    monkeypatch.setattr(LayerNorm, "backward", backward)
    said = quire("gradients", "tiny", "--prompt", "The owl")
    assert said.code == 1, "ours, not the user's"
    assert "WRONG: the backward of LayerNorm, in blocks.0.attention_norm and 2 more." in said.out
    assert re.search(r"backward: \S*test_gradients.py:\d+\n", said.out)
    assert "The calls around it differ only because of it." in said.out
    marked = [line.split()[0] for line in said.out.splitlines() if line.endswith("  wrong")]
    assert marked == ["attention_norm:", "feedforward_norm:", "norm:"]
    assert len(re.findall(r"^ +by input +2\.0e\+00 ", said.out, re.M)) == 3 and "by weight" not in said.out
    found = json.loads(quire("gradients", "tiny", "--prompt", "The owl", "--json").out)
    assert not found["agree"] and {row["layer"] for row in found["wrong"]} == {"LayerNorm"}
    assert found["calls"][0]["verdict"] == "within"


def test_numbers_that_json_lacks(tiny: Run, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerNorm, "backward", lambda self, grad: grad * float("nan") * self.saved()[0])
    said = quire("gradients", "tiny", "--prompt", "The owl", "--json")
    assert said.code == 1 and "NaN" not in said.out and "Infinity" not in said.out
    assert {row["layer"] for row in json.loads(said.out)["wrong"]} == {"LayerNorm"}


def test_what_is_wrong_besides(tiny: Run, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreNormBlock, "backward", lambda self, grad: grad)
    said = quire("gradients", "tiny", "--prompt", "The owl")
    assert said.code == 1 and "WRONG: the backward of PreNormBlock, in blocks.0.\n" in said.out
    assert "  never calls the backward of blocks.0.attention.query\n" in said.out


def test_deep_models_are_folded(tiny: Run, quire, small_settings, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"vocabulary_size": tiny.tokenizer.vocabulary_size, "separator": tiny.tokenizer.separator}
    model = build_model(small_settings("gpt", context_length=32, layers=2, **size))
    monkeypatch.setattr(Run, "model", lambda self, device: model)
    monkeypatch.setattr(command, "MANY", 30)
    folded = quire("gradients", "tiny", "--prompt", "The owl").out.splitlines()
    whole = quire("gradients", "tiny", "--prompt", "The owl", "--all").out.splitlines()
    assert len(whole) - len(folded) == 14
    (row,) = [line for line in folded if "calls within" in line]
    assert row.startswith("  blocks.1: PreNormBlock, 14 calls within ") and row.endswith("agrees")


def test_a_long_prompt_is_cut_and_said(tiny: Run, quire) -> None:
    text = Path("book.txt").read_text(encoding="utf-8")
    said = quire("gradients", "tiny", "--prompt", text, "--json")
    assert said.code == 0 and json.loads(said.out)["left_out"] == len(text) - 33
    assert f"{len(text) - 33:,} tokens are left out, 33 remain" in said.plain


@pytest.mark.parametrize(
    "line, says",
    [
        ("gradients tiny", r"The prompt is empty.*Give some text as --prompt"),
        ("gradients tiny --prompt T", r"The prompt is a single token.*Give more text"),
        ("gradients tiny --prompt Ω", r"lacks 'Ω' .*--unknown skip"),
        ("gradients tiny --prompt Ω --unknown skip", r"The prompt is empty"),
        ("gradients tiny --prompt TΩ --unknown skip", r"single token"),
        ("gradients tiny --prompt The --target owl", r"a gpt model, which reads no source: leave --target out"),
        ("gradients nope --prompt The", r"nope is not a run"),
        ("gradients tiny --prompt The --out book.txt/page.html", r"(Not a directory|File exists).*book.txt"),
        ("gradients tiny --prompt The --out .", r"directory"),
        ("gradients", r"(?i)required.*RUN"),
    ],
)
def test_mistakes(desk: Path, quire, line: str, says: str) -> None:
    before = {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()}
    said = quire(*shlex.split(line))
    assert said.code == 2 and said.out == "", said.err
    assert re.search(says, said.plain), said.err
    assert {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()} == before


def test_a_full_disk_leaves_the_page_that_was_there(tiny: Run, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("page.html").write_text("before")

    def operation(kind: str, path: Path) -> None:
        if kind == "rename":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "operation", operation)
    said = quire("gradients", "tiny", "--prompt", "The owl", "--out", "page.html")
    assert said.code == 2 and "No space left on device" in said.plain
    assert Path("page.html").read_text() == "before" and not Path("page.html.new").exists()
