"""quire plan, and quire train by plan, as a person and a program see them."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

import quire as library
from quire.planning import plan as planning
from quire.planning.plan import Plan
from quire.planning.recipes import table
from quire.run import Run

TINY = ["--preset", "gpt-mini", "--model.layers", "1", "--model.embedding-size", "12", "--model.context-length", "16",
        "--batch-size", "2", "--device", "cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for no longer than it takes to take three steps."""
    monkeypatch.setattr(planning, "MEASURING_SECONDS", 1e-3)


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_plan_is_printed_and_leaves_nothing(desk: Path, quire) -> None:
    before = everything(desk)
    said = quire("plan", "book.txt", "--minutes", "1")
    assert said.code == 0
    words = [line.split()[0] for line in said.out.splitlines()]
    assert words[:10] == ["text", "tokenizer", "model", "parameters", "training", "arithmetic", "memory", "speed",
                          "time", "expected"]  # fmt: skip
    assert everything(desk) == before


def test_json_has_every_number(desk: Path, quire) -> None:
    said = quire("plan", "book.txt", "--minutes", "1", "--json")
    assert said.code == 0 and said.out.count("\n") == 1
    found = json.loads(said.out)
    assert list(found) == [field.name for field in fields(Plan)]
    assert found["recipe"] in table()["recipes"] and found["kind"] == "modern"
    assert found["seconds"] == 60 and found["steps"] > 0 and found["step_seconds"] > 0
    assert found["tokens"] == found["steps"] * found["batch_size"] * found["context_length"]
    assert found["bytes"] == pytest.approx(0.9 * Path("book.txt").stat().st_size, rel=0.02)
    assert len(found["counted"]) == 5 and all(0 < bits < 8 for bits in found["counted"])


def test_the_flags_of_train_are_taken(desk: Path, quire) -> None:
    found = json.loads(quire("plan", "book.txt", *TINY, "--steps", "7", "--json").out)
    assert (found["kind"], found["steps"], found["batch_size"], found["context_length"]) == ("gpt", 7, 2, 16)
    assert found["recipe"] == "" and found["prediction"] is None
    assert found["model"]["embedding_size"] == 12


def test_an_epoch_is_the_steps_that_training_takes_for_it(desk: Path, quire) -> None:
    words = ["book.txt", *TINY, "--epochs", "0.05", "--json"]
    foretold = json.loads(quire("plan", *words).out)
    assert json.loads(quire("train", *words, "--run", "run").out)["steps"] == pytest.approx(foretold["steps"], abs=1)


def test_fastest_has_tables_and_says_so(desk: Path, quire) -> None:
    words = ["book.txt", "--fastest", "--model.ngram-orders", "2", "3", "--json"]
    found = json.loads(quire("plan", *words).out)
    assert found["kind"] == "ngram"
    assert found["parameters"]["n-gram tables"] > 0 and found["memory"]["n-gram tables"] > 0
    assert quire("plan", "book.txt", "--fastest", *TINY).code == 2


def test_what_cannot_fit_is_refused(desk: Path, quire) -> None:
    before = everything(desk)
    large = ["--model.embedding-size", "65536", "--model.layers", "96", "--model.heads", "64"]
    said = quire("plan", "book.txt", *large)
    assert said.code == 2 and "This cannot fit: training needs about" in said.plain and "GB" in said.plain
    short = quire("train", "book.txt", "--minutes", "0.1", *large)  # where there is no time to measure anything
    assert short.code == 2 and "This cannot fit" in short.plain
    assert everything(desk) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty|no text"),
        (b"short", "5 characters"),
        (b"\0\1\2\xff" * 5000, "binary|not text"),
        (None, "no file|not"),
    ],
)
def test_bad_texts_get_the_sentence_that_train_gives(content: bytes | None, words: str, desk: Path, quire) -> None:
    if content is not None:
        Path("bad.txt").write_bytes(content)
    said, trained = quire("plan", "bad.txt"), quire("train", "bad.txt", "--steps", "1")
    assert said.code == trained.code == 2
    assert said.err == trained.err


def test_training_by_minutes_follows_the_plan(desk: Path, quire) -> None:
    said = quire("train", "book.txt", "--run", "new", "--minutes", "0.05", "--batch-size", "3", "--sample-tokens", "0")
    assert said.code == 0 and "By plan, changed by flags: a pure Transformer" in said.err
    config = Run("new").config
    recipe = table()["recipes"][planning.chosen("modern", 3, 9000)]
    assert config["training"]["batch_size"] == 3  # the flag, over the recipe
    assert config["training"]["learning_rate"] == recipe["training"]["learning_rate"]
    assert config["model"]["layers"] == recipe["model"]["layers"] and config["model"]["kind"] == "modern"
    assert config["training"]["minutes"] == 0.05


def test_training_with_fastest_takes_tables(desk: Path, quire) -> None:
    said = quire("train", "book.txt", "--run", "new", "--fastest", "--steps", "2", "--sample-tokens", "0")
    assert said.code == 0 and "n-grams beside it" in said.err
    assert Run("new").config["model"]["kind"] == "ngram" and Run("new").config["training"]["steps"] == 2


def test_a_run_that_exists_is_refused_before_anything_is_planned(desk: Path, quire, monkeypatch) -> None:
    monkeypatch.setattr(planning, "choose", None)
    said = quire("train", "book.txt", "--run", "tiny", "--minutes", "1")
    assert said.code == 2 and "exists already" in said.plain


def test_the_library_plans_too(desk: Path) -> None:
    found = library.plan("book.txt", minutes=1, model={"layers": 1}, batch_size=2)
    assert isinstance(found, Plan) and found.model["layers"] == 1 and found.batch_size == 2
    assert found.recipe == ""  # those are no recipe's settings
