"""The table of recipes, and what is chosen and foretold by it."""

import math

import numpy as np
import pytest

from quire.data.reading import DataSettings
from quire.errors import UserError
from quire.planning import recipes
from quire.planning.measure import FEWEST_BITS
from quire.planning.recipes import FAMILIES, Choice, chosen, family, features, predicted, table
from quire.training.settings import TrainingSettings, layered, typed

COUNTED = [3.4, 2.9, 2.5, 2.3, 2.2]


@pytest.mark.parametrize("name", table()["recipes"])
def test_every_recipe_is_a_configuration(name: str) -> None:
    recipe = table()["recipes"][name]
    settings = typed(layered("default", flags=recipe))
    assert settings.model.kind in FAMILIES
    assert {"kind", "layers", "embedding_size", "heads", "feedforward_size", "context_length"} <= set(recipe["model"])
    assert {"batch_size", "learning_rate"} <= set(recipe["training"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("core_seconds", [0.01, 15, 1e6])
@pytest.mark.parametrize("size", [1, 20_000, 10**12])
def test_there_is_a_recipe_for_every_time_and_text(family: str, core_seconds: float, size: int) -> None:
    assert table()["recipes"][chosen(family, core_seconds, size).recipe]["model"]["kind"] == family


def test_the_nearest_place_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [
        {"family": "modern", "core_seconds": 15, "bytes": 20_000, "recipe": "small"},
        {"family": "modern", "core_seconds": 600, "bytes": 20_000, "recipe": "large"},
        {"family": "ngram", "core_seconds": 600, "bytes": 20_000, "recipe": "tables", "share": 0.3},
    ]
    monkeypatch.setattr(recipes, "table", lambda: {"choices": places, "recipes": {}})
    found = [chosen("modern", seconds, 30_000).recipe for seconds in (1, 60, 200, 9000)]
    assert found == ["small", "small", "large", "large"]
    assert chosen("ngram", 600, 1) == Choice("tables", 0.3)
    assert chosen("ngram", 900, 1) == Choice("tables", 0.2)  # as many core-seconds
    assert chosen("ngram", 100, 1) == Choice("tables", 1.0)


def test_a_prediction_is_the_regression_and_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    coefficients = [0.5, -0.1, 0.0, 0.01, 0.2, 0.03]
    fit = {"coefficients": coefficients, "deviation": 0.05, "core_seconds": [15, 60], "bytes": [20_000, 1_000_000]}
    monkeypatch.setattr(recipes, "table", lambda: {"predictions": {"modern": fit}})
    found = predicted("modern", 30, 100_000, COUNTED, 2.9)
    harder = math.log(2.9 / 2.2)
    share = 0.5 - 0.1 * math.log(30) + 0.01 * math.log(100_000) + 0.2 * harder + 0.03 * math.log(30) * harder
    assert found is not None and found.bits_per_byte == pytest.approx(2.2 * math.exp(share))
    assert (found.low, found.high) == pytest.approx(
        (found.bits_per_byte / math.exp(0.1), found.bits_per_byte * math.exp(0.1))
    )
    assert not found.extrapolated
    for seconds, size in ((3000, 100_000), (5, 100_000), (30, 10**9), (30, 500)):
        assert predicted("modern", seconds, size, COUNTED, 2.9).extrapolated  # type: ignore[union-attr]
    assert predicted("ngram", 30, 100_000, COUNTED) is None
    assert predicted("modern", 0, 100_000, COUNTED, 2.9) is None
    assert predicted("modern", 3.7, 100_000, COUNTED, 2.9) is None  # a quarter of the shortest that was measured
    assert predicted("modern", 30, 100_000, COUNTED) is None  # nobody has asked a pilot


def test_n_grams_beside_a_network_are_foretold_no_worse_than_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = {"deviation": 0.05, "core_seconds": [15, 60], "bytes": [20_000, 10**6]}
    fits = {"modern": {**fit, "coefficients": [0.1] + [0.0] * 5}, "ngram": {**fit, "coefficients": [0.1] + [0.0] * 6}}
    monkeypatch.setattr(recipes, "table", lambda: {"predictions": fits})
    found = {family: predicted(family, 30, 100_000, COUNTED, 2.9).bits_per_byte for family in FAMILIES}  # type: ignore[union-attr]
    assert found == pytest.approx({"modern": min(COUNTED) * math.exp(0.1), "ngram": min(COUNTED)})


def test_what_suits_more_text_is_no_recipe_for_a_longer_time(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [
        {"family": "modern", "core_seconds": 60, "bytes": 20_000, "recipe": "short"},
        {"family": "modern", "core_seconds": 180, "bytes": 20_000, "recipe": "small", "share": 0.5},
        {"family": "modern", "core_seconds": 600, "bytes": 1_000_000, "recipe": "large"},
        {"family": "modern", "core_seconds": 60, "bytes": 80_000_000, "recipe": "many"},
    ]
    monkeypatch.setattr(recipes, "table", lambda: {"choices": places, "recipes": {}})
    assert chosen("modern", 180, 30_000) == Choice("small", 0.5)
    assert chosen("modern", 18_000, 30_000) == Choice("small", 0.5 * 180 / 18_000)  # 90 core-seconds, as before
    assert chosen("modern", 18_000, 2_000_000) == Choice("large")
    assert chosen("modern", 600, 30_000_000).recipe == "large"  # of so much text only a short time was measured


EXTREMES = [[FEWEST_BITS] * 5, [8.0, *[FEWEST_BITS] * 4], [FEWEST_BITS, *[8.0] * 4], [30.0] * 5, COUNTED]


@pytest.mark.parametrize("counted", EXTREMES)
@pytest.mark.parametrize("core_seconds", [1e-6, 1, 3.75, 60, 1e9])
@pytest.mark.parametrize("size", [1, 50_000, 10**15])
def test_no_text_and_no_time_is_too_extreme(
    core_seconds: float, size: int, counted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    coefficients = {"ngram": [1.0, -0.2, -0.03, 0.01, 0.003, -0.3, 0.3],  # about what the sweep's first texts gave
                    "modern": [1.0, -0.2, -0.03, 0.01, 0.4, -0.03]}  # fmt: skip
    fit = {"deviation": 0.2, "core_seconds": [15, 1800], "bytes": [20_000, 10**8]}
    fits = {family: {**fit, "coefficients": coefficients[family]} for family in FAMILIES}
    monkeypatch.setitem(table(), "predictions", fits)
    for kind in FAMILIES:
        for pilot in (FEWEST_BITS, 2.9, 30.0):
            assert np.isfinite(features(kind, core_seconds, size, counted, pilot)).all()
            found = predicted(kind, core_seconds, size, counted, pilot)
            if core_seconds < 3.75:  # a quarter of the shortest that was measured: nothing is learned yet
                assert found is None
                continue
            assert found is not None and 0 < found.low < found.bits_per_byte < found.high < math.inf


MINUTES = TrainingSettings(minutes=1.0)


def test_a_recipe_is_chosen_where_only_the_time_is_given() -> None:
    text = DataSettings()
    assert family("", False, MINUTES, text) == "modern"
    assert family("", True, MINUTES, text) == family("", True, TrainingSettings(steps=3), text) == "ngram"
    assert family("--preset", False, MINUTES, text) == ""
    assert family("", False, TrainingSettings(steps=3), text) == ""
    assert family("", False, TrainingSettings(minutes=1.0, decisions="d.jsonl"), text) == ""
    assert family("", False, MINUTES, DataSettings(pairs="p.tsv")) == ""


@pytest.mark.parametrize(
    ("named", "training", "data", "sentence"),
    [
        ("--preset", MINUTES, DataSettings(), "--preset names another"),
        ("", MINUTES, DataSettings(pairs="p.tsv"), "--fastest is for a text, and --pairs p.tsv is none"),
        (
            "",
            TrainingSettings(minutes=1.0, decisions="old/decisions.jsonl"),
            DataSettings(),
            "--config RUN/config.toml --decisions old/decisions.jsonl",
        ),
    ],
)
def test_fastest_is_refused_beside_what_says_what_to_train(
    named: str, training: TrainingSettings, data: DataSettings, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        family(named, True, training, data)
