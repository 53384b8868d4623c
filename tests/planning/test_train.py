"""quire.train and the plan: the recipe is chosen where only the minutes are given, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest

import quire
from quire.config import to_table
from quire.planning import train as planning_train
from quire.planning.recipes import table
from quire.training.settings import Settings, layered, typed

TEXT = "The owl calls over the hill, and the night answers it. " * 400


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that trainings would have had; none is made."""
    made: list[Settings] = []
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    monkeypatch.setattr(planning_train, "new_run", lambda settings, *rest: made.append(settings))
    monkeypatch.setattr(planning_train, "begin_run", lambda make, *rest: make())
    return made


@pytest.mark.parametrize(("fastest", "kind"), [(False, "modern"), (True, "ngram")])
def test_minutes_alone_follow_the_plan(trained: list[Settings], fastest: bool, kind: str) -> None:
    quire.train("book.txt", minutes=0.25, fastest=fastest)
    recipe = table()["recipes"][quire.plan("book.txt", minutes=0.25, fastest=fastest).recipe]
    assert trained[0].model.kind == recipe["model"]["kind"] == kind
    model = to_table(trained[0].model)
    assert all(model[name] == value for name, value in recipe["model"].items())
    assert (trained[0].training.minutes, trained[0].training.learning_rate) == (
        0.25,
        recipe["training"]["learning_rate"],
    )


def test_what_is_given_goes_over_the_recipe(trained: list[Settings]) -> None:
    quire.train("book.txt", minutes=0.25, model={"layers": 5}, learning_rate=0.003)
    assert (trained[0].model.kind, trained[0].model.layers) == ("modern", 5)  # type: ignore[attr-defined]
    assert trained[0].training.learning_rate == 0.003


@pytest.mark.parametrize(
    "given", [{"preset": "gpt-mini", "minutes": 1}, {"steps": 7}, {"minutes": 1, "model": {"kind": "recurrent"}}]
)
def test_a_preset_a_kind_or_a_length_in_steps_has_its_own_settings(
    trained: list[Settings], given: dict[str, Any]
) -> None:
    quire.train("book.txt", **given)
    preset, model = given.get("preset", "default"), given.get("model", {})
    length = {name: value for name, value in given.items() if name in ("minutes", "steps")}
    flags = {"data": {"text": ["book.txt"]}, "model": model, "training": length}
    assert trained == [typed(layered(preset, flags=flags))]


def test_a_run_that_exists_is_refused_before_the_text_is_read(trained: list[Settings]) -> None:
    Path("mine").mkdir()
    Path("mine", "thesis").write_text("precious")
    with pytest.raises(quire.UserError, match="exists already"):
        quire.train("missing.txt", run="mine", minutes=1)
    assert not trained
