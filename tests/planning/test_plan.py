"""quire plan, and quire train by plan, as a person and a program see them."""

import io
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import quire as library
from quire.cli.plan import differs, told
from quire.config import Table, merged
from quire.errors import UserError
from quire.planning import plan as planning
from quire.planning.machine import Speed
from quire.planning.plan import Plan, follow, seconds_evaluating
from quire.planning.recipes import FAMILIES, table
from quire.planning.train import choice
from quire.run import Run
from quire.training.clock import BESIDE_SECONDS
from quire.training.settings import Settings, TrainingSettings, layered, typed

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
    assert 0 < found["seconds"] <= 60  # on a fast machine less: longer, it would learn so short a text by heart
    assert found["steps"] > 0 and found["step_seconds"] > 0
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
        (b"", "bad.txt is empty"),
        (b"short", "The text has 5 characters: too short"),
        (b"\0\1\2\xff" * 5000, "bad.txt is a binary file, not text"),
        (None, "There is no file, folder or corpus named 'bad.txt'"),
    ],
)
def test_bad_texts_get_the_sentence_that_train_gives(content: bytes | None, words: str, desk: Path, quire) -> None:
    if content is not None:
        Path("bad.txt").write_bytes(content)
    said, trained = quire("plan", "bad.txt"), quire("train", "bad.txt", "--steps", "1")
    assert said.code == trained.code == 2
    assert words in said.plain
    assert said.err == trained.err


def test_a_text_that_repeats_itself_has_a_plan(desk: Path, quire) -> None:
    Path("same.txt").write_text("a" * 50_000)
    found = json.loads(quire("plan", "same.txt", "--minutes", "0.1", "--json").out)
    assert all(0 < bits < 0.01 for bits in found["counted"])
    assert found["prediction"] is None or found["prediction"]["bits_per_byte"] > 0


def test_too_little_to_count_is_said(desk: Path, quire) -> None:
    Path("letters").mkdir()
    for letter in "abcde":
        Path("letters", f"{letter}.txt").write_text(letter)
    said = quire("plan", "letters", "--validation", "book.txt")
    assert said.code == 2 and "The training text has 5 characters: too few" in said.plain


@pytest.mark.parametrize(("content", "documents"), [("жщцю" * 100, "file"), ("жщцю\n" * 100, "line")])
def test_nothing_held_out_that_the_tokenizer_knows_is_said(content: str, documents: str, desk: Path, quire) -> None:
    Path("other.txt").write_text(content, encoding="utf-8")
    words = ["--tokenizer", "tiny", "--unknown", "skip", "--validation", "other.txt", "--documents", documents]
    said, trained = quire("plan", "book.txt", *words), quire("train", "book.txt", *words, "--steps", "1")
    assert said.code == trained.code == 2 and "Nothing of the held-out text is left" in said.plain
    assert said.err == trained.err


def test_training_by_minutes_follows_the_plan(desk: Path, quire) -> None:
    said = quire("train", "book.txt", "--run", "new", "--minutes", "0.05", "--batch-size", "3", "--sample-tokens", "0")
    assert said.code == 0 and "By plan, changed by flags: a pure Transformer" in said.err
    config = Run("new").config
    recipe = table()["recipes"][planning.chosen("modern", 3, 9000).recipe]
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
    assert library.plan("book.txt", minutes=1, fastest=True, model={"ngram_orders": (2, 3)}).kind == "ngram"


def test_the_library_chooses_no_recipe_where_the_command_would_not(desk: Path) -> None:
    small = {"layers": 1, "embedding_size": 12, "heads": 1, "context_length": 16}
    found = library.plan("book.txt", minutes=1, model={"kind": "gpt", **small})
    assert (found.kind, found.recipe, found.fastest) == ("gpt", "", None)
    assert library.plan("book.txt", steps=3, model=small).recipe == ""
    for other in ({"preset": "gpt-mini"}, {"model": {"kind": "gpt"}}, {"data": {"pairs": "addition"}}):
        with pytest.raises(UserError, match="Leave one of them out"):
            library.plan(fastest=True, **other)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_fastest_is_for_a_text_and_repeats_nothing(command: str, desk: Path, quire) -> None:
    said = quire(command, "--fastest", "--pairs", "addition")
    assert said.code == 2 and "--fastest is for a text" in said.plain
    said = quire(command, "book.txt", "--fastest", "--minutes", "1", "--decisions", "old/decisions.jsonl")
    assert said.code == 2 and "--config RUN/config.toml --decisions old/decisions.jsonl" in said.plain


@pytest.mark.parametrize("name", ["plan", "train"])
def test_a_text_may_come_by_a_pipe(name: str, desk: Path, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path("book.txt").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False))
    words = ["-", "--minutes", "0.05", "--json"]
    said = quire(name, *words, *(["--run", "piped", "--sample-tokens", "0"] if name == "train" else []))
    assert said.code == 0
    if name == "plan":
        assert json.loads(said.out)["text"] == "-"
    else:
        assert Run("piped").config["data"]["text"] == ["-"]
        assert Path("piped/data/standard-input.txt").read_bytes() == data


def test_a_plan_on_cuda_says_that_nothing_was_compiled(desk: Path) -> None:
    found = library.plan("book.txt", minutes=1, model={"layers": 1})
    speed = next(line for line in told(found) if line.startswith("speed"))
    assert speed.endswith("measured")
    assert f"{speed} uncompiled".replace("on cpu", "on cuda") in told(replace(found, device="cuda"))


# ---- what is chosen, on machines of the tests' own ----

RECIPES = {
    kind: [name for name, recipe in table()["recipes"].items() if recipe["model"]["kind"] == kind][:3]
    for kind in FAMILIES
}
PLACES = [
    {"family": kind, "core_seconds": seconds, "bytes": 9000, "recipe": recipe}
    for kind in FAMILIES
    for seconds, recipe in zip([1.5, 150.0, 15_000.0], RECIPES[kind], strict=True)
]


@pytest.fixture
def on_machine(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """on_machine(t): a step takes t seconds, whatever is trained; what is best changes with the time."""
    monkeypatch.setitem(table(), "choices", PLACES)
    seconds = {place["recipe"]: 0.01 for place in PLACES}
    monkeypatch.setitem(table(), "step_seconds", seconds)

    def step(step_seconds: float) -> None:
        monkeypatch.setattr(planning, "measured_step", lambda *arguments: Speed(1, step_seconds))

    return step


def building(**flags: Any) -> Callable[[Table], Settings]:
    over = merged({"data": {"text": ["book.txt"]}, "training": {"device": "cpu"}}, flags)
    return lambda recipe: typed(layered("default", flags=merged(recipe, over)))


@pytest.mark.parametrize(("minutes", "step_seconds"), [(0.5, 1e-4), (0.5, 1.0), (2.5, 0.01), (2.5, 1.0)])
def test_training_takes_what_the_plan_said(minutes: float, step_seconds: float, on_machine) -> None:
    on_machine(step_seconds)
    build = building(training={"minutes": minutes})
    said = planning.planned(build, "modern").recipe
    assert said == follow(build, "modern", time.time()).recipe
    assert said == follow(build, "modern", time.time() - 59 * minutes).recipe  # however long it took to read
    power = 0.01 / step_seconds if minutes >= 1 else 1.0  # too short to measure
    assert said == planning.chosen("modern", 60 * minutes * power, 9000).recipe


@pytest.mark.parametrize(("minutes", "spent"), [(1.5, 1.5), (12.0, 3.0)])
def test_a_short_text_is_not_learned_by_heart(minutes: float, spent: float, on_machine, monkeypatch) -> None:
    place = {"family": "modern", "core_seconds": 720.0, "bytes": 9000, "recipe": RECIPES["modern"][1], "share": 0.25}
    monkeypatch.setitem(table(), "choices", [*PLACES, place])
    on_machine(0.01)
    build = building(training={"minutes": minutes})
    found, said = follow(build, "modern", time.time()), planning.planned(build, "modern")
    assert found.settings.training.minutes == spent and said.seconds == pytest.approx(60 * spent)
    assert ("by heart" in choice(found, "modern")) == ("by heart" in differs(said))
    assert ("by heart" in differs(said)) == (spent < minutes) == (said.share < 1)
    assert planning.planned(building(training={"minutes": minutes}, model={"layers": 3}), "modern").share == 1


def test_steps_get_one_recipe_at_any_speed_and_time(on_machine) -> None:
    build, found = building(training={"steps": 5}, model={"kind": "ngram"}), set()
    for step_seconds in (1e-4, 1.0):
        on_machine(step_seconds)
        found.add(planning.planned(build, "ngram").recipe)
        found |= {follow(build, "ngram", time.time() - elapsed).recipe for elapsed in (0, 1000)}
    assert found == {RECIPES["ngram"][1]}


def test_the_step_of_a_larger_model_says_nothing_of_the_machine(on_machine) -> None:
    on_machine(1.0)  # a hundred times a recipe's, because of the layers
    build = building(training={"minutes": 2.5}, model={"layers": 40})
    found = follow(build, "modern", time.time())
    wanted = table()["recipes"][RECIPES["modern"][1]]["model"]  # that for 150 core-seconds
    assert found.recipe == "" and found.settings.model.embedding_size == wanted["embedding_size"]


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        ({"minutes": 3.0}, True),
        ({"threads": 1, "seed": 5}, True),
        ({"optimizer": "sgd"}, False),
        ({"epochs": 1.0}, True),
    ],
)
def test_a_recipe_is_its_own_until_a_flag_changes_it(flags: Table, same: bool) -> None:
    for name, recipe in table()["recipes"].items():
        settings = typed(layered("default", flags=merged(recipe, {"training": flags})))
        assert planning.holds(settings, name) is same


def test_evaluations_of_a_run_by_steps_are_counted_as_it_makes_them(tiny: Run) -> None:
    made = sum("validation_loss" in row for row in tiny.metrics())
    assert seconds_evaluating(TrainingSettings(steps=30), Speed(1, 0.1), 0.0, 30) == made * BESIDE_SECONDS


@pytest.mark.parametrize("seconds", [3.0, 60.0, 3600.0])
def test_evaluations_take_their_share_of_the_time_or_are_one(seconds: float) -> None:
    speed = Speed(1, 0.1, evaluation_seconds=2.0)
    each = 2.0 + BESIDE_SECONDS * min(1.0, seconds / 60)
    taken = seconds_evaluating(TrainingSettings(minutes=seconds / 60), speed, seconds, 0)
    assert taken == each or (taken <= 0.05 * seconds and math.isclose(taken % each, 0, abs_tol=1e-9))
