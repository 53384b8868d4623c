"""Every mistake has its sentence: exit code 2, no traceback, and nothing made or lost."""

# ruff: noqa: E501 (a mistake is one row)

import errno
import gzip
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from quire import files
from quire.training import engines

PATCH = pytest.MonkeyPatch
Arrange = Callable[[Path, PATCH], object]
TINY = (
    "--preset gpt-mini --model.layers 1 --model.heads 2 --model.embedding-size 16 --model.context-length 32"
    " --batch-size 4 --threads 1 --device cpu --steps 4"
)


def flip(name: str, offset: int) -> Arrange:
    """Change one bit of a file."""

    def arrange(desk: Path, patch: PATCH) -> None:
        data = bytearray((desk / name).read_bytes())
        data[offset] ^= 1
        (desk / name).write_bytes(data)

    return arrange


def put(name: str, data: bytes | str) -> Arrange:
    """Write a file."""

    def arrange(desk: Path, patch: PATCH) -> None:
        (desk / name).parent.mkdir(exist_ok=True)
        (desk / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return arrange


def without(name: str) -> Arrange:
    """Delete a file or folder."""
    return lambda desk, patch: files.remove(desk / name)


def piped(data: bytes) -> Arrange:
    """Standard input."""
    return lambda desk, patch: patch.setattr(
        sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    )


def full_disk(desk: Path, patch: PATCH) -> None:
    def operation(kind: str, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    patch.setattr(files, "operation", operation)


def no_memory(desk: Path, patch: PATCH) -> None:
    def backpropagate(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    patch.setattr(engines.Autograd, "backpropagate", backpropagate)


@dataclass(frozen=True)
class Bad:
    """A mistake: what is put in place, the command line after `quire`, and what its sentence must match."""

    name: str
    line: str
    says: str
    arrange: Arrange = lambda desk, patch: None
    code: int = 2


TEXT = [
    Bad("missing file", "train nothere.txt", r"no file, folder or corpus named 'nothere.txt'"),
    Bad("corpus misspelt", "train shakespear", r"Did you mean shakespeare\? Known corpora: .*tiny-shakespeare"),
    Bad("empty file", "train empty.txt", r"empty.txt is empty", put("empty.txt", "")),
    Bad("whitespace only", "train blank.txt", r"nothing but whitespace", put("blank.txt", " \n\t\n" * 500)),
    Bad("binary file", "train photo.jpg", r"photo.jpg is a binary file", put("photo.jpg", b"\xff\xd8\x00\x01" * 900)),
    Bad("a run's weights", "train tiny/checkpoints/best/model.safetensors", r"is a binary file, not text"),
    Bad(
        "bad UTF-8",
        "train latin.txt",
        r"latin.txt: the byte at offset 3 \(0xe9\) is not valid utf-8. Say --encoding \w+",
        put("latin.txt", "caf\xe9 au lait, d\xe9j\xe0 vu\n".encode("latin-1") * 99),
    ),
    Bad("too short", "train short.txt", r"has 60 characters: too short.*at least 500", put("short.txt", "a bcde" * 10)),
    Bad(
        "held-out text too small",
        f"train book.txt --validation few.txt {TINY}",
        r"held-out text has fewer than 50 characters",
        put("few.txt", "The owl."),
    ),
    Bad("missing validation text", f"train book.txt --validation nope.txt {TINY}", r"named 'nope.txt'"),
    Bad("folder without text", "train photos", r"photos holds no text \(1 skipped", put("photos/a.png", b"\0" * 99)),
    Bad("glob without match", "train *.md", r"\*\.md holds no text"),
    Bad("bad address", "train ftp://host/book.txt", r"is not an http or https address"),
    Bad("address that answers nothing", "train http://127.0.0.1:9/book.txt", r"could not be downloaded: "),
    Bad("hub without an owner", "train hf:poems", r"'hf:poems' names no dataset of the Hugging Face hub. Say hf:OWNER/NAME"),
    Bad("hub option", "train hf:a/poems?spit=test", r"'spit' is not an option. Did you mean split\?"),
    Bad("odd tokens", "train odd.bin", r"odd.bin has an odd number of bytes", put("odd.bin", b"\x00\x01\xff")),
    Bad("characters as tokens", "train chars.bin", r"chars.bin holds no id above 255", put("chars.bin", bytes([7, 0]) * 500)),
    Bad("jsonl without the field", "train a.jsonl", r"line 1, has no field 'text' \(there: body\)",
        put("a.jsonl", json.dumps({"body": "x"}) + "\n")),
    Bad("jsonl that is none", "train b.jsonl", r"line 2, is not JSON", put("b.jsonl", '{"text": "x"}\n{oh\n')),
    Bad("corrupt gz", "train b.txt.gz", r"is damaged, or not gzip", put("b.txt.gz", b"\x1f\x8b" + b"nonsense" * 9)),
    Bad("gz cut short", "train c.txt.gz", r"is cut short", put("c.txt.gz", gzip.compress(b"The owl calls.")[:-9])),
    Bad("empty pipe", "train -", r"Standard input is empty", piped(b"")),
    Bad("unknown encoding", "train book.txt --encoding utf-9", r"--encoding 'utf-9' is not a known.*Did you mean utf-?8"),
    Bad("misspelt documents", "train book.txt --documents lines", r"neither file, line nor blank-line. Did you mean line"),
]  # fmt: skip

SETTINGS = [
    Bad("unknown flag", "train book.txt --stepz 3", r"(?i)unrecognized.*--stepz.*--steps"),
    Bad("wrong type", "train book.txt --steps many", r"(?i)--steps.*invalid.*many|many.*--steps"),
    Bad("unknown preset", "train book.txt --preset gpt5", r"The preset 'gpt5' is not known. Did you mean gpt\d\? Choices: default, gpt-mini"),
    Bad("unknown setting", "train book.txt --config bad.toml", r"training has no setting 'batchsize'. Did you mean batch_size",
        put("bad.toml", "[training]\nbatchsize = 3\n")),
    Bad("unknown table", "train book.txt --config bad.toml", r"The table 'trainning' is not known. Did you mean training",
        put("bad.toml", "[trainning]\nsteps = 3\n")),
    Bad("value of the wrong type", "train book.txt --config bad.toml", r"training.steps must be a whole number, not 'five'",
        put("bad.toml", "[training]\nsteps = 'five'\n")),
    Bad("settings where a table is wanted", "train book.txt --config bad.toml", r"model must be a table, \[model\] with settings below it", put("bad.toml", "model = 3\n")),
    Bad("broken TOML", "train book.txt --config bad.toml", r"bad.toml cannot be read as TOML: .*line 1",
        put("bad.toml", "[training\n")),
    Bad("missing configuration", "train book.txt --config nope.toml", r"There is no configuration file nope.toml"),
    Bad("heads that do not divide", f"train book.txt {TINY} --model.heads 3", r"16 cannot be divided among 3 heads"),
    Bad("no layers", f"train book.txt {TINY} --model.layers 0", r"--model.layers must be at least 1"),
    Bad("dropout of 1", f"train book.txt {TINY} --model.dropout 1", r"--model.dropout must be at least 0 and below 1"),
    Bad("two lengths", "train book.txt --steps 4 --minutes 1", r"--steps and --minutes both give the length"),
    Bad("no length", "train book.txt --minutes 0", r"Say how long to train: --minutes M, --steps N"),
    Bad("negative learning rate", "train book.txt --steps 4 --learning-rate -1", r"--learning-rate must be.*not -1"),
    Bad("learning rate nan", "train book.txt --steps 4 --learning-rate nan", r"--learning-rate must be a finite number"),
    Bad("no batch", "train book.txt --steps 4 --batch-size 0", r"--batch-size must be at least 1, not 0"),
    Bad("unknown optimizer", "train book.txt --steps 4 --optimizer adamv", r"--optimizer 'adamv' is not known. Did you mean adam"),
    Bad("unknown engine", "train book.txt --steps 4 --engine automatic", r"--engine 'automatic' is not known.*Choices: autograd, manual"),
    Bad("unknown tokenizer", f"train book.txt {TINY} --tokenizer characters", r"character"),
    Bad("missing card", f"train book.txt {TINY} --device cuda:99", r"--device cuda:99: this torch finds no such device"),
    Bad("unknown device", f"train book.txt {TINY} --device gpu", r"--device gpu is not a device. Choices: auto, cpu, cuda"),
    Bad("float16 on a CPU", f"train book.txt --run new {TINY} --precision float16", r"--precision float16 needs a GPU.*bfloat16"),
    Bad("compiling by hand", f"train book.txt {TINY} --compile yes --engine manual", r"--compile yes needs --engine autograd"),
    Bad("negative threads", f"train book.txt {TINY} --threads -1", r"--threads must be .*not -1"),
    Bad("curriculum without shares", f"train book.txt {TINY} --curriculum 16 32", r"--curriculum '16' is no stage: write SHARE:CONTEXT"),
    Bad("curriculum with a long context", f"train book.txt --run new {TINY} --curriculum 1:16 1:64", r"Stage 2 of --curriculum has a context of 64 tokens, more than the model's 32"),
    Bad("missing decisions", f"train book.txt {TINY} --decisions nope.jsonl", r"nope.jsonl"),
]  # fmt: skip

RUNS = [
    Bad("run exists", f"train book.txt --run tiny {TINY}", r"tiny exists already.*quire resume tiny"),
    Bad("a file is there", f"train book.txt --run book.txt {TINY}", r"book.txt exists already"),
    Bad("run in a place that cannot be", f"train book.txt --run book.txt/run {TINY}", r"Not a directory.*book.txt"),
    Bad("disk full", f"train book.txt --run new {TINY}", r"No space left on device.*What was saved before is whole", full_disk),
    Bad("out of memory", f"train book.txt --run new {TINY}", r"Out of memory. Take a smaller --batch-size", no_memory),
    Bad("no run named", "resume", r"(?i)required.*RUN"),
    Bad("not a run", "resume book.txt", r"book.txt is not a run"),
    Bad("missing run", "generate runs/nope --prompt A", r"runs/nope is not a run.*`quire runs`"),
    Bad("two lengths to resume", "resume tiny --steps 3 --minutes 1", r"--steps N or --minutes M, one of them"),
    Bad("text moved", "resume tiny --steps 1 --data moved.txt", r"training text of tiny cannot be read.*quire resume tiny --data PATH"),
    Bad("text changed", "resume tiny --steps 1 --data book.txt", r"not the text that tiny began with", put("book.txt", "Another text. " * 200)),
    Bad("corrupt weights", "generate tiny --prompt A --tokens 3", r"model.safetensors is damaged: tensor \S+ does not match",
        flip("tiny/checkpoints/best/model.safetensors", -40)),
    Bad("corrupt header", "evaluate tiny", r"model.safetensors is damaged", flip("tiny/checkpoints/best/model.safetensors", 20)),
    Bad("corrupt optimizer", "resume tiny --steps 1", r"training.safetensors is damaged", flip("tiny/checkpoints/last/training.safetensors", -40)),
    Bad("corrupt state", "resume tiny --steps 1", r"state.json is damaged", flip("tiny/checkpoints/last/state.json", 60)),
    Bad("no checkpoint", "generate tiny --prompt A", r"tiny has no checkpoint yet.*quire resume tiny", without("tiny/checkpoints")),
    Bad("edited config.toml", "evaluate tiny", r"config.toml does not match its checksum: it was edited or damaged", flip("tiny/config.toml", 30)),
    Bad("damaged tokenizer.json", "generate tiny --prompt A", r"tokenizer.json is damaged", flip("tiny/tokenizer.json", 40)),
    Bad("missing tokenizer.json", "generate tiny --prompt A", r"no tokenizer", without("tiny/tokenizer.json")),
    Bad("damaged manifest.json", "evaluate tiny", r"manifest.json is damaged", flip("tiny/manifest.json", 40)),
    Bad("damaged held-out text", "evaluate tiny", r"validation.bin is damaged", flip("tiny/data/validation.bin", 40)),
    Bad("missing held-out text", "evaluate tiny", r"validation.bin is missing.*quire evaluate tiny TEXT", without("tiny/data/validation.bin")),
    Bad("damaged metrics", "plot tiny", r"metrics.jsonl is damaged: line 1 is not JSON", flip("tiny/metrics.jsonl", 0)),
]  # fmt: skip

USE = [
    Bad("unknown characters", "generate tiny --prompt Ωmega", r"lacks 'Ω' \(U\+03A9\) at position 0.*--unknown skip"),
    Bad("all skipped, nothing known", "evaluate tiny greek.txt --unknown skip", r"Nothing of this text is in the model's vocabulary",
        put("greek.txt", "ΩΨΩΨ" * 50)),
    Bad("negative temperature", "generate tiny --prompt A --temperature -1", r"--temperature must be a number of at least 0, not -1"),
    Bad("temperature nan", "generate tiny --prompt A --temperature nan", r"--temperature must be a number"),
    Bad("top-p above 1", "generate tiny --prompt A --top-p 1.5", r"--top-p must be above 0 and at most 1, not 1.5"),
    Bad("negative top-k", "generate tiny --prompt A --top-k -3", r"--top-k must be at least 0, not -3"),
    Bad("no tokens", "generate tiny --prompt A --tokens 0", r"--tokens must be at least 1, not 0"),
    Bad("negative seed", "generate tiny --prompt A --seed -1", r"--seed must be at least 0"),
    Bad("empty stop string", "generate tiny --prompt A --stop ''", r"--stop must not be empty"),
    Bad("two prompts", "generate tiny --prompt A --prompt-file book.txt", r"--prompt and --prompt-file both give the prompt"),
    Bad("no beams", "generate tiny --prompt A --beams 0", r"--beams must be at least 1, not 0"),
    Bad("more beams than tokens", "generate tiny --prompt A --beams 9999", r"--beams 9999 is more than the vocabulary has tokens: at most \d+"),
    Bad("more samples than beams", "generate tiny --prompt A --beams 2 --samples 3", r"--samples 3 is more than the --beams 2"),
    Bad("negative length penalty", "generate tiny --prompt A --beams 2 --length-penalty -1", r"--length-penalty must be between 0 and 10, not -1"),
    Bad("length penalty nan", "generate tiny --prompt A --beams 2 --length-penalty nan", r"--length-penalty must be between 0 and 10, not nan"),
    Bad("length penalty of a draw", "generate tiny --prompt A --length-penalty 2", r"--length-penalty ranks the texts of a beam search. Give --beams"),
    Bad("beams that draw", "generate tiny --prompt A --beams 2 --top-k 3", r"--top-k shapes a draw, and --beams draws nothing"),
    Bad("presence penalty nan", "generate tiny --prompt A --presence-penalty nan", r"--presence-penalty must be a finite number"),
    Bad("no batch to write", "generate tiny --prompt A --batch-size 0", r"--batch-size must be at least 1, not 0"),
    Bad("two ways to prompts", "generate tiny --prompts book.txt --prompt A", r"--prompt and --prompts both give the prompt"),
    Bad("missing prompts", "generate tiny --prompts nope.txt", r"prompts file nope.txt cannot be read \(No such file"),
    Bad("no prompts", "generate tiny --prompts none.txt", r"There are no prompts in none.txt. Write one on each line",
        put("none.txt", "")),
    Bad("binary prompts", "generate tiny --prompts latin.txt", r"prompt in latin.txt is not UTF-8 text \(at byte 1\)",
        put("latin.txt", b"a\xff\x00\xfe")),
    Bad("missing prompt file", "generate tiny --prompt-file nope.txt", r"prompt file nope.txt cannot be read \(No such file"),
    Bad("prompt file not UTF-8", "generate tiny --prompt-file latin.txt", r"prompt in latin.txt is not UTF-8 text \(at byte 3\)",
        put("latin.txt", b"caf\xe9")),
    Bad("piped prompt not UTF-8", "generate tiny", r"prompt in standard input is not UTF-8", piped(b"\xff\xfe\x00")),
    Bad("missing card to write", "generate tiny --prompt A --device cuda:99", r"finds no such device"),
    Bad("text with unknown characters", "evaluate tiny greek.txt", r"lacks 'Ω' .*--unknown skip or --unknown replace",
        put("greek.txt", "The owl. Ω\n" * 9)),
    Bad("missing text to measure", "evaluate tiny nope.txt", r"no file, folder or corpus named 'nope.txt'"),
    Bad("stride of 0", "evaluate tiny --stride 0", r"--stride must be between 1 and the context length 32, not 0"),
    Bad("stride beyond the context", "evaluate tiny --stride 33", r"--stride must be between 1 .* not 33"),
    Bad("plot of nothing", "plot", r"Name at least one run"),
    Bad("plot of no run", "plot tiny nope", r"nope is not a run"),
    Bad("plot without measurements", "plot tiny", r"tiny has no measurements yet", without("tiny/metrics.jsonl")),
    Bad("plot over what is not", "plot tiny --over bytes", r"(?i)invalid choice.*bytes"),
    Bad("picture in a place that cannot be", "plot tiny --out book.txt/x.png", r"(Not a directory|File exists).*book.txt"),
    Bad("runs of no folder", "runs nowhere", r"There is no folder nowhere"),
    Bad("argument too many", "doctor now", r"(?i)unrecognized.*now"),
    Bad("unknown command", "trian book.txt", r"There is no command 'trian'. Did you mean train\?"),
]  # fmt: skip

ALL = TEXT + SETTINGS + RUNS + USE


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
def test_bad_input(bad: Bad, desk: Path, quire, monkeypatch: PATCH) -> None:
    bad.arrange(desk, monkeypatch)
    before = tree(desk)
    said = quire(*shlex.split(bad.line))
    assert said.code == bad.code
    assert re.search(bad.says, said.plain), said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    monkeypatch.undo()
    assert tree(desk) == before, "something was made, changed or lost"


def test_the_table_is_what_it_claims() -> None:
    assert len({bad.name for bad in ALL}) == len(ALL) >= 80
    assert {bad.line.split()[0] for bad in ALL} >= {"train", "resume", "generate", "evaluate", "plot", "runs", "doctor"}


def test_sentences_fit_a_screen(desk: Path, quire) -> None:
    """One or two sentences: what our own mistakes say is never longer than a few lines, whatever was given."""
    for words in (["train", "x" * 300], ["generate", "tiny", "--prompt", "".join(map(chr, range(0x3B1, 0x3C9)))]):
        said = quire(*words)
        assert said.code == 2
        assert said.err.startswith("quire: ") and len(said.err) < 800 and said.err.count("\n") == 1


def test_no_command_shows_the_commands(quire) -> None:
    said = quire()
    assert said.code == 2 and "usage: quire COMMAND" in said.out + said.err


def test_debug_shows_the_traceback(desk: Path) -> None:
    from quire.cli.main import call
    from quire.errors import UserError

    with pytest.raises(UserError, match="not a run"):
        call(["evaluate", "nope", "--debug"])


def test_ctrl_c_outside_training(desk: Path, quire, monkeypatch: PATCH) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quire.cli.evaluate.evaluate", interrupted)
    said = quire("evaluate", "tiny")
    assert said.code == 130 and said.err == "Interrupted.\n"


def test_our_own_mistakes_keep_their_traceback(desk: Path, monkeypatch: PATCH) -> None:
    from quire.cli.main import call

    monkeypatch.setattr("quire.cli.evaluate.evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(["evaluate", "tiny"])


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every folder with None."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
