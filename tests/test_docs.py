"""What README and docs/ show works as it stands there."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from quire.cli.main import call
from quire.data.corpora import CORPORA
from quire.data.reading import DataSettings, read
from quire.errors import UserError
from quire.models import MODELS
from quire.models.stack import STACK
from quire.tokenizers import KNOWN, TOKENIZERS, CharacterTokenizer
from quire.training.optimizers import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--steps 4 --model.layers 1 --model.context-length 32 --model.embedding-size 32 --batch-size 2"
VERSE = "The owl that calls upon the night\nspeaks the unbeliever's fright. O wake,\n"


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def cut_down(command: str) -> list[str]:
    """A command of the README, its training shortened and its model made small."""
    words = shlex.split(command, comments=True)[1:]
    if words[0] in ("train", "resume", "finetune") and "--verify" not in words:
        for flag in ("--minutes", "--steps", "--epochs"):
            while flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        words += shlex.split(SMALL) if words[0] == "train" else ["--steps", "3"]
        words += ["--model.heads", "2"] if words[0] == "train" and "lstm" not in words else []
    if words[0] == "generate":
        words += ["--tokens", "5"]
    return words


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the documents speak of."""
    for name in ("book.txt", "poems.txt", "other.txt"):
        (tmp_path / name).write_text(VERSE * 60)
    (tmp_path / "names.txt").write_text("\n".join(f"anna bert carla dora {i}" for i in range(200)))
    (tmp_path / "phrases.tsv").write_text("".join(f"the owl {i}\towl number {i} calls\n" for i in range(60)))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.md").write_text("the night calls upon the owl, that fright\n" * 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_readme_commands(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `quire ...` line of the README, in its order, with --steps cut down."""
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("quire ")]
    assert len(commands) >= 10
    for command in commands:
        words = cut_down(command)
        assert call(words) == 0, f"{command}\n{capsys.readouterr().err}"


def test_readme_python(desk: Path) -> None:
    """The README's Python, likewise."""
    (code,) = blocks(ROOT / "README.md", "python")
    small = 'model={"layers": 1, "embedding_size": 32, "heads": 2, "context_length": 32}, steps=4'
    assert "minutes=5" in code
    exec(compile(code.replace("minutes=5", small), "README.md", "exec"), {})


def test_extending(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, tokenizer, corpus and optimizer of docs/extending.md, as they stand there."""
    for table in (MODELS, TOKENIZERS, CORPORA, OPTIMIZERS):
        for name in ("bigram", "byte", "sonnets", "lion"):
            monkeypatch.setitem(table, name, None)
            del table[name]
    module = type(sys)("extending")
    monkeypatch.setitem(sys.modules, "extending", module)  # dataclasses look their module up
    names = {"__name__": "extending"}
    module.__dict__.update(names)
    for code in blocks(ROOT / "docs" / "extending.md", "python"):
        exec(compile(code, "docs/extending.md", "exec"), module.__dict__)
    for kind in ("bigram-autograd", "bigram-manual", "bytes", "lion"):
        assert call(["resume", f"runs/{kind}", "--steps", "2"]) == 0
        assert call(["resume", f"runs/{kind}", "--verify"]) == 0
    assert {"bigram", "byte", "sonnets", "lion"} <= {*MODELS, *TOKENIZERS, *CORPORA, *OPTIMIZERS}


def test_engines(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/engines.md, and the layer: checked, trained and resumed by its own backward."""
    (commands,) = blocks(ROOT / "docs" / "engines.md", "sh")
    for command in commands.splitlines():
        assert call(cut_down(command)) == 0, command
    monkeypatch.setitem(STACK, "swish", STACK["gelu"])
    module = type(sys)("engines_page")
    monkeypatch.setitem(sys.modules, "engines_page", module)
    for code in blocks(ROOT / "docs" / "engines.md", "python"):
        exec(compile(code, "docs/engines.md", "exec"), module.__dict__)
    assert call(["resume", "runs/swish", "--verify"]) == 0
    losses = [line["train_loss"] for line in module.run.metrics()]
    assert losses[-1] < losses[0]
    with pytest.raises(AssertionError):  # the page's checks notice a wrong sign
        wrong = blocks(ROOT / "docs" / "engines.md", "python")[:2]
        exec("\n".join(wrong).replace("(s + self", "(s - self"), {"__name__": "engines_page"})


def test_lightning(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning as docs/neighbours.md shows it, smaller; the tokenizer of GPT-2 is played by one of as many letters."""
    letters = CharacterTokenizer("".join(map(chr, range(10, 10 + 50257 - 2))))
    monkeypatch.setitem(KNOWN, "gpt2", lambda: letters)
    codes = blocks(ROOT / "docs" / "neighbours.md", "python")
    assert len(codes) == 2
    for old, new in [("max_len=1024", "max_len=16"), ("emb_dim=768", "emb_dim=8"), ("model_dim=768", "model_dim=8"),
                     ("layers=12", "layers=1"), ("heads=12", "heads=2"), ("max_steps=600_000", "max_steps=2"),
                     ("max_steps=200", "max_steps=2"), ('"layers": 2', '"layers": 1')]:  # fmt: skip
        assert sum(old in code for code in codes) == 1, old
        codes = [code.replace(old, new) for code in codes]
    for code in codes:
        exec(compile(code, "docs/neighbours.md", "exec"), {})
    assert call(["evaluate", "runs/book", "--device", "cpu"]) == 0


def test_extending_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example corpus names a member that its archive has."""
    code = next(code for code in blocks(ROOT / "docs" / "extending.md", "python") if "sonnets" in code)
    monkeypatch.setitem(CORPORA, "sonnets", CORPORA["shakespeare"])
    exec(code, {})
    if os.environ.get("QUIRE_CACHE_OF_THE_USER"):
        monkeypatch.setenv("QUIRE_CACHE", os.environ["QUIRE_CACHE_OF_THE_USER"])
    try:
        corpus = read(["sonnets"], DataSettings())
    except UserError as error:
        pytest.skip(f"the archive is neither cached nor to be had: {error}")
    assert "Shall I compare thee" in next(iter(corpus.documents))
