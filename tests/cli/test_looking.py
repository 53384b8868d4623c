"""quire attention and quire look as a person and a program see them; the commands of docs/looking-inside.md."""

import json
import re
import shlex
from pathlib import Path

import matplotlib.image
import pytest
import torch

from quire import files
from quire.inspection import attention as inspected
from quire.layers.embedding import Embedding
from quire.run import Run

ROOT = Path(__file__).resolve().parents[2]
MEASURES = ["entropy", "distance", "previous_token", "first_token", "induction"]


# ---- attention ----


def test_attention_draws_and_tells(tiny: Run, quire) -> None:
    said = quire("attention", "tiny", "--prompt", "The owl calls")
    assert said.code == 0, said.err
    made = {path.name for path in Path("tiny/attention").iterdir()}
    assert made == {"attention.html", "overview.png", "blocks.0.attention.png"}
    assert matplotlib.image.imread("tiny/attention/blocks.0.attention.png").shape[0] > 300
    lines = said.out.splitlines()
    assert lines[0].split() == ["layer", "head", "entropy", "distance", "previous", "first", "induction"]
    assert [line.split()[:2] for line in lines[1:3]] == [["blocks.0.attention", "0"], ["1", lines[2].split()[1]]]
    assert "tiny/attention/overview.png" in said.plain and "tiny/attention/attention.html" in said.plain
    assert quire("generate", "tiny", "--prompt", "The", "--tokens", "3").code == 0, "the run is as usable as before"


def test_attention_as_json(tiny: Run, quire) -> None:
    said = quire("attention", "tiny", "--prompt", "The owl", "--out", "drawn", "--json")
    assert said.code == 0 and said.out.count("\n") == 1
    found = json.loads(said.out)
    assert list(found) == ["run", "page", "pictures", "tokens", "left_out", "heads"]
    assert found["tokens"] == {"prompt": list("The owl")} and found["left_out"] == 0
    assert all(Path(name).is_file() for name in [found["page"], *found["pictures"]])
    assert [row["head"] for row in found["heads"]] == [0, 1]
    for row in found["heads"]:
        assert list(row) == ["layer", "head", *MEASURES]
        assert all(isinstance(row[measure], float) and row[measure] >= 0 for measure in MEASURES)


def test_a_long_prompt_is_cut_and_said(tiny: Run, quire) -> None:
    said = quire("attention", "tiny", "--prompt", Path("book.txt").read_text(encoding="utf-8"))
    assert said.code == 0
    left_out = len(Path("book.txt").read_text(encoding="utf-8")) - 32
    assert f"its first {left_out:,} tokens are left out, 32 remain" in said.plain


def test_a_single_token(tiny: Run, quire) -> None:
    said = quire("attention", "tiny", "--prompt", "T", "--json")
    assert said.code == 0, said.err
    row = json.loads(said.out)["heads"][0]
    assert (row["entropy"], row["distance"], row["previous_token"], row["first_token"]) == (0, 0, None, None)
    assert quire("attention", "tiny", "--prompt", "T").code == 0


# ---- look ----


def test_look_takes_apart(tiny: Run, quire) -> None:
    said = quire("look", "tiny", "--token", "e")
    assert said.code == 0 and said.err == ""
    total = sum(parameter.numel() for parameter in tiny.model("cpu").parameters())
    assert said.out.startswith(f"tiny: gpt, {total:,} parameters\n")
    assert "tokenizer  character with" in said.out and "embedding_size 16" in said.out
    assert re.search(r"gradient   of one batch of [\d,]+ held-out tokens, where the loss is \d\.\d{4}\n", said.out)
    assert "head.weight is token_embedding.weight (tied), counted once" in said.out
    assert len(re.findall(r"^  [ -]\d\.\d{3}  '", said.out, re.MULTILINE)) == 10
    assert max(map(len, said.out.splitlines())) <= 100


def test_look_as_json(tiny: Run, quire) -> None:
    found = json.loads(quire("look", "tiny", "--token", "e", "--json").out)
    model = tiny.model("cpu")
    assert {row["name"]: row["parameters"] for row in found["tensors"]} == {
        name: parameter.numel() for name, parameter in model.named_parameters()
    }
    for name in ("parts", "blocks", "tensors"):
        assert sum(row["parameters"] for row in found[name]) == found["parameters"]
        assert all(row["gradient_norm"] > 0 for row in found[name])
    assert found["settings"]["embedding_size"] == 16 and found["gradient"]["loss"] > 0
    assert found["neighbours"]["token"] == "e" and len(found["neighbours"]["nearest"]) == 10
    assert json.loads(quire("look", "tiny", "--json").out)["neighbours"] is None


def test_look_without_held_out_text(tiny: Run, quire) -> None:
    """As an imported run: weights alone, and said so."""
    files.remove(tiny.path / "data" / "validation.bin")
    said = quire("look", "tiny")
    assert said.code == 0 and "gradient   not measured: this run has no held-out text" in said.out
    found = json.loads(quire("look", "tiny", "--json").out)
    assert found["gradient"] is None and found["tokenizer"]["occurring"] is None
    assert all(row["gradient_norm"] is None for row in found["tensors"])


# ---- mistakes ----


@pytest.mark.parametrize(
    "line, says",
    [
        ("attention tiny", r"The prompt is empty.*Give some text as --prompt"),
        ("attention tiny --prompt Ω", r"lacks 'Ω' .*--unknown skip"),
        ("attention tiny --prompt Ω --unknown skip", r"The prompt is empty"),
        ("attention nope --prompt A", r"nope is not a run"),
        ("attention tiny --prompt The --out book.txt", r"(Not a directory|File exists).*book.txt"),
        ("attention tiny --prompt The --device cuda:99", r"finds no such device"),
        ("attention", r"(?i)required.*RUN"),
        ("look nope", r"nope is not a run"),
        ("look tiny --token Ω", r"--token 'Ω' is not a token of this model's vocabulary of \d+"),
        ("look tiny --token owl", r"--token 'owl' is 3 tokens to this model: 'o', 'w', 'l'. Name one of them"),
        ("look tiny --token ''", r"--token is empty"),
        ("look", r"(?i)required.*RUN"),
    ],
)
def test_mistakes(desk: Path, quire, line: str, says: str) -> None:
    refused(quire, desk, line, says)


@pytest.mark.parametrize("line", ["attention tiny --prompt The", "look tiny"])
@pytest.mark.parametrize(
    "name, says",
    [
        ("tiny/checkpoints/best/model.safetensors", r"model.safetensors is damaged"),
        ("tiny/tokenizer.json", r"tokenizer.json is damaged"),
        ("tiny/config.toml", r"config.toml does not match its checksum"),
    ],
)
def test_damaged_runs(desk: Path, quire, line: str, name: str, says: str) -> None:
    data = bytearray(Path(name).read_bytes())
    data[-40] ^= 1
    Path(name).write_bytes(data)
    refused(quire, desk, line, says)


def test_a_damaged_held_out_text(desk: Path, quire) -> None:
    path = Path("tiny/data/validation.bin")
    path.write_bytes(path.read_bytes()[:-8])
    refused(quire, desk, "look tiny", r"validation.bin is damaged")


def test_a_model_without_attention(tiny: Run, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "model", lambda self, device: torch.nn.Sequential(Embedding(4, 4)))
    refused(
        quire, tiny.path.parent, "attention tiny --prompt The", r"without attention: there is none to show.*quire look"
    )


def test_huge_prompts_are_capped(tiny: Run, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspected, "LONGEST", 10)
    said = quire("attention", "tiny", "--prompt", "The owl calls upon", "--json")
    found = json.loads(said.out)
    assert "".join(found["tokens"]["prompt"]) == "calls upon" and found["left_out"] == 8
    assert "too long to show" in said.plain


def test_a_full_disk_leaves_what_was_there(tiny: Run, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    quire("attention", "tiny", "--prompt", "The owl", "--out", "drawn")
    before = tree(Path("drawn"))

    def operation(kind: str, path: Path) -> None:
        if kind == "rename":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "operation", operation)
    refused(quire, Path("drawn"), "attention tiny --prompt night --out drawn", r"No space left on device")
    assert tree(Path("drawn")) == before


def refused(quire, folder: Path, line: str, says: str) -> None:
    before = tree(folder)
    said = quire(*shlex.split(line))
    assert said.code == 2 and said.out == "", said.err
    assert re.search(says, said.plain), said.err
    assert "Traceback" not in said.err
    assert tree(folder) == before, "something was made, changed or lost"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# ---- the document ----


def test_the_documents_commands_and_python(desk: Path, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/looking-inside.md as it stands there, on the tiny run."""
    text = (ROOT / "docs" / "looking-inside.md").read_text(encoding="utf-8")
    (desk / "runs").mkdir()
    (desk / "tiny").rename(desk / "runs" / "book")
    commands = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        assert quire(*words).code == 0, command
    for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(code, "looking-inside.md", "exec"), {})
