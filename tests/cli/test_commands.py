"""train, resume, runs, corpora and doctor as a person and a program see them."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from quire.cli.flags import program, value_of
from quire.cli.main import call
from quire.data.corpora import CORPORA
from quire.run import Run

SMALL = shlex.split(
    "--preset gpt-mini --model.layers 1 --model.heads 2 --model.embedding-size 16 --model.context-length 32"
    " --batch-size 2 --threads 1 --device cpu --steps 3"
)


# ---- train ----


def test_train_tells_what_came_of_it(desk: Path, quire) -> None:
    said = quire("train", "book.txt", *SMALL)
    assert said.code == 0 and said.out == ""
    lines = said.err.splitlines()
    assert re.match(
        r"book.txt: 1 document, [\d,]+ characters, [\d,]+ tokens, vocabulary \d+ \(character\); 10.0% held", lines[0]
    )
    assert re.match(r"Training runs/book: a gpt model of [\d,]+ parameters, context 32, for 3 steps on cpu", lines[1])
    run = Run("runs/book")
    best = min(row["validation_loss"] for row in run.metrics() if "validation_loss" in row)
    assert f"Validation loss {best:.4f} nats per token" in said.err
    assert "The model writes:" in said.err and "Loss plot: runs/book/loss.png" in said.err
    following = said.err[said.err.index("Next:") :].removeprefix("Next:").strip().splitlines()
    assert [line.split()[1] for line in following] == ["generate", "evaluate", "resume", "train"]
    columns = {re.search(r"\S   +\S", f"{line.strip()}").end() for line in following}  # type: ignore[union-attr]
    assert len(columns) == 1, "what each command is for stands in one column"


def test_train_json_is_one_object_and_nothing_else(desk: Path, quire) -> None:
    said = quire("train", "book.txt", "--run", "new", "--json", *SMALL)
    assert said.code == 0 and said.out.count("\n") == 1
    found = json.loads(said.out)
    assert list(found) == ["run", "steps", "tokens", "seconds", "validation_loss", "bits_per_byte"]
    assert (found["run"], found["steps"]) == ("new", 3)
    assert found["tokens"] <= 3 * 2 * 32 and found["seconds"] > 0
    assert json.loads(quire("evaluate", "new", "--json").out)["bits_per_byte"] == pytest.approx(found["bits_per_byte"])


def test_runs_are_named_after_their_text(desk: Path, quire) -> None:
    for expected in ("runs/book", "runs/book-2", "runs/book-3"):
        assert json.loads(quire("train", "book.txt", "--json", *SMALL).out)["run"] == str(Path(expected))


def test_flags_over_file_over_preset(desk: Path, quire) -> None:
    (desk / "mine.toml").write_text("[model]\nheads = 4\nembedding_size = 32\n\n[training]\nseed = 5\nbatch_size = 3\n")
    line = "train book.txt --run new --preset gpt-mini --config mine.toml --model.layers 1 --model.embedding-size 16"
    said = quire(
        *shlex.split(f"{line} --model.context-length 32 --batch-size 2 --threads 1 --device cpu --steps 2"),
    )
    assert said.code == 0, said.err
    config = Run("new").config
    assert config["model"]["heads"] == 4 and config["training"]["seed"] == 5  # the file's
    assert config["model"]["embedding_size"] == 16 and config["training"]["batch_size"] == 2  # the flags'
    assert config["training"]["learning_rate"] == 1e-3 and config["model"]["dropout"] == 0.1  # the preset's
    assert config["training"]["minutes"] == 0


def test_the_length_given_by_flag_is_the_only_one(desk: Path, quire) -> None:
    quire("train", "book.txt", "--run", "new", *SMALL, "--epochs", "0.02", "--steps", "0")
    training = Run("new").config["training"]
    assert (training["epochs"], training["steps"], training["minutes"]) == (0.02, 0, 0)


def test_a_run_repeated_from_its_own_config(desk: Path, quire) -> None:
    """The same file, data and seed give the same run."""
    quire("train", "book.txt", "--run", "one", *SMALL)
    assert quire("train", "--config", "one/config.toml", "--run", "two", "--json").code == 0
    weights = [Path(name, "checkpoints", "last", "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


# ---- resume ----


def test_a_finished_run_says_so(desk: Path, quire) -> None:
    before = Path("tiny/metrics.jsonl").read_bytes()
    said = quire("resume", "tiny")
    assert said.code == 0
    assert said.err.startswith("tiny is finished (step 30): nothing to resume. To train it further: quire resume tiny ")
    assert Path("tiny/metrics.jsonl").read_bytes() == before


def test_a_finished_run_trains_on(desk: Path, quire) -> None:
    said = quire("resume", "tiny", "--steps", "5", "--data", "book.txt", "--json")
    assert said.code == 0 and "tiny trains on from step 30; the learning rate warms up again." in said.err
    assert json.loads(said.out)["steps"] == 35
    assert Run("tiny").metrics()[-1]["step"] == 35


def test_verify_proves_and_keeps_nothing(desk: Path, quire) -> None:
    before = {path: path.read_bytes() for path in Path("tiny").rglob("*") if path.is_file()}
    said = quire("resume", "tiny", "--verify", "--json")
    assert json.loads(said.out) == {"run": "tiny", "exact": True, "first_difference": None}
    assert "Exact: 6 steps at once" in quire("resume", "tiny", "--verify").err
    assert {path: path.read_bytes() for path in Path("tiny").rglob("*") if path.is_file()} == before


# ---- runs ----


def test_runs_lists_good_and_bad_ones(desk: Path, quire) -> None:
    (desk / "deep" / "er").mkdir(parents=True)
    (desk / "tiny").rename(desk / "deep" / "er" / "owl")
    (desk / "broken").mkdir()
    (desk / "broken" / "config.toml").write_text("nothing")
    rows = json.loads(quire("runs", ".", "--json").out)["runs"]
    assert [row["run"] for row in rows] == ["broken", str(Path("deep/er/owl"))]
    assert "does not match its checksum" in rows[0]["problem"]
    owl = rows[1]
    best = min(row["validation_loss"] for row in Run("deep/er/owl").metrics() if "validation_loss" in row)
    assert owl["steps"] == 30 and owl["validation_loss"] == best and owl["model_bytes"] > 10_000
    said = quire("runs", ".")
    assert said.code == 0 and "owl" in said.out and f"{best:.4f}" in said.out and "kB" in said.out


def test_runs_of_an_empty_folder(desk: Path, quire) -> None:
    (desk / "runs").mkdir()
    assert quire("runs").out == "No runs in runs. A first one: quire train\n"
    assert json.loads(quire("runs", "--json").out) == {"runs": []}


# ---- doctor ----


def test_doctor_tells_what_the_machine_has(quire) -> None:
    found = json.loads(quire("doctor", "--json").out)
    for name in ("quire", "python", "platform", "torch", "numpy", "safetensors", "tyro", "rich", "matplotlib",
                 "devices", "cores", "torch_threads", "memory", "disk_free", "cache", "missing"):  # fmt: skip
        assert found[name] not in ("", None), name
    assert "cpu" in found["devices"] and found["cores"] >= 1 and found["memory"].endswith(" GiB")
    said = quire("doctor")
    assert said.code == 0 and said.err == ""
    assert re.search(rf"^torch +{re.escape(found['torch'])}$", said.out, re.MULTILINE)


def test_doctor_names_what_is_missing(quire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.cli.doctor.unused_card", lambda: "An NVIDIA card is present, but idle.")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert len(json.loads(quire("doctor", "--json").out)["missing"]) == 2
    assert "An NVIDIA card is present, but idle.\nNo C++ compiler" in quire("doctor").out


# ---- the command itself ----


@pytest.mark.parametrize(
    "line, value",
    [("--preset gpt2", "gpt2"), ("--preset=gpt2", "gpt2"), ("--preset gpt2 x --preset gpt3", "gpt3"), ("x", None),
     ("--preset", None)],
)  # fmt: skip
def test_a_flag_before_parsing(line: str, value: str | None) -> None:
    assert value_of(line.split(), "--preset") == value


def test_next_commands_can_be_pasted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`quire` where the shell finds it, else the path of the program that runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "env" / "quire")])
    monkeypatch.setattr("shutil.which", lambda name: "/somewhere/quire")
    assert program() == "quire"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert program() == str(Path("env/quire"))


def test_a_reader_who_leaves_is_no_mistake(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def fileno(self) -> int:
            return self.number

    with open(desk / "pipe", "w") as file:
        closed = Closed()
        closed.number = file.fileno()
        monkeypatch.setattr(sys, "stdout", closed)
        assert call(["evaluate", "tiny"]) == 0


# ---- corpora ----


def test_corpora_lists_what_is_known(quire, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    said = quire("corpora")
    assert said.code == 0
    for name in CORPORA:
        assert re.search(rf"^ *{name} .*", said.out, re.MULTILINE), name
    assert re.search(r"enwik8 +36.6 MB +100.0 MB +no +CC BY-SA", said.out)
    assert re.search(r"openwebtext +12.9 GB +39.8 GB +streams", said.out)
    assert "gpt2-ranks" not in said.out and "hf:OWNER/NAME" in said.out


def test_corpora_json_knows_what_is_here(quire, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path))
    source = CORPORA["tiny-shakespeare"]
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / source.filename).write_bytes(bytes(source.size))
    rows = json.loads(quire("corpora", "--json").out)["corpora"]
    assert [row["name"] for row in rows] == list(CORPORA)
    here = {row["name"]: row["cached"] for row in rows}
    assert here.pop("tiny-shakespeare") is True and here.pop("openwebtext") is None
    assert set(here.values()) == {False}
    for row in rows:
        assert row["download_bytes"] > 0 and row["text_bytes"] > 0
        assert row["licence"] and row["attribution"] and row["from"] and row["description"].endswith(".")
