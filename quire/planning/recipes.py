"""The recipes, and which of them suits a text and a time: a table fitted by benchmarks/sweep.py.

A core-second here is a second of training steps on one core of the machine that the sweep ran on. Other machines and
threads are compared by measuring: a step of a recipe took `step_seconds` there.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quire.config import Table
from quire.data.reading import DataSettings
from quire.errors import UserError
from quire.training.settings import TrainingSettings

TABLE = Path(__file__).with_name("recipes.json")
EXPORTABLE, FASTEST = "modern", "ngram"  # the families of recipes: kinds of models
FAMILIES = {EXPORTABLE: "a pure Transformer", FASTEST: "a Transformer with n-grams beside it"}
SIZE_WEIGHT = 0.5  # how much a factor of two in the text's size counts, beside one in the time
NEAR = 1.5  # within this factor of what was measured, a prediction is no extrapolation
WIDE = 2.0  # deviations to each side: the sweep has few texts, and others differ from them more than they do
FARTHEST = 4.0  # it goes no farther beyond what was measured than by this factor, and stays there


@dataclass(frozen=True)
class Prediction:
    """Bits per byte of the held-out text, in a range of two standard deviations to each side: those of texts which were
    left out of the fit; `extrapolated` where time or text are well outside what was measured."""

    bits_per_byte: float
    low: float
    high: float
    extrapolated: bool


@dataclass(frozen=True)
class Choice:
    """A recipe's name, and the share of the time after which it is to end: longer, it knew so short a text by heart."""

    recipe: str
    share: float = 1.0


@cache
def table() -> Table:
    """recipes.json: `recipes` by name, their `step_seconds`, `choices` by time and size, `predictions` by family."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def family(named: str, fastest: bool, training: TrainingSettings, data: DataSettings) -> str:
    """The family of recipes to choose from; "" where something but the time says what to train.

    `named` is what names another recipe, as the user spells it, or "". Raises UserError where --fastest cannot be.
    """
    other = named or bool(data.pairs or training.decisions or not training.minutes)
    if not fastest:
        return "" if other else EXPORTABLE
    if named:
        raise UserError(f"--fastest chooses a recipe, and {named} names another. Leave one of them out.")
    if data.pairs:
        raise UserError(f"--fastest is for a text, and --pairs {data.pairs} is none. Leave one of them out.")
    if training.decisions:
        raise UserError(
            "--fastest chooses a recipe, and --decisions repeats a run, which has its own. Leave --fastest out, and"
            f" take the run's settings: --config RUN/config.toml --decisions {training.decisions}"
        )
    return FASTEST


def chosen(family: str, core_seconds: float, size: int) -> Choice:
    """What did best where the sweep measured nearest to this time and size of text in bytes.

    A time longer than any that was measured with texts up to a size counts as the longest there: what suits more text
    than that is no recipe for it. Where a part of the time did best, so many core-seconds are taken now.
    """
    places = [place for place in table()["choices"] if place["family"] == family]
    if not places:
        return Choice(next(name for name, recipe in table()["recipes"].items() if recipe["model"]["kind"] == family))

    longest = {
        place["bytes"]: max(other["core_seconds"] for other in places if other["bytes"] <= place["bytes"])
        for place in places
    }

    def distance(place: Any) -> float:
        time = math.log2(min(max(core_seconds, 1.0), longest[place["bytes"]]) / place["core_seconds"])
        return abs(time) + SIZE_WEIGHT * abs(math.log2(max(size, 1) / place["bytes"]))

    nearest = min(places, key=distance)
    if "share" not in nearest:
        return Choice(nearest["recipe"])
    return Choice(nearest["recipe"], min(1.0, nearest["share"] * nearest["core_seconds"] / max(core_seconds, 1.0)))


def features(family: str, core_seconds: float, size: int, counted: Sequence[float], pilot: float) -> np.ndarray:
    """What the bits per byte are predicted from: (6,), or (7,) with n-grams beside the network. `counted` are those of
    Kneser-Ney at the orders 2 to 6, `pilot` those of a small network after a few steps (pilot.py).

    ln(bits per byte / best) = a + b ln s + c ln^2 s + d ln n + e ln p + f ln s ln p, and with n-grams beside it
                             = a + b ln s + c ln^2 s + d ln n + e ln s ln n + f ln(best) + g ln(order 2 / best),
    with s core-seconds, n bytes of text, `best` the least of `counted`, and p = pilot / best.
    """
    time, length, best = math.log(core_seconds), math.log(size), min(counted)
    if family == FASTEST:
        order = math.log(counted[0] / best)
        return np.array([1.0, time, time**2, length, time * length, math.log(best), order])
    harder = math.log(pilot / best)
    return np.array([1.0, time, time**2, length, harder, time * harder])


def predicted(
    family: str, core_seconds: float, size: int, counted: Sequence[float], pilot: float = 0.0
) -> Prediction | None:
    """The bits per byte to expect; None where the sweep has nothing of this family, or for far too short a time, or
    without a pilot that this family needs."""
    found = table()["predictions"].get(family)
    if found is None or core_seconds < found["core_seconds"][0] / FARTHEST:  # in a few steps nothing is learned yet
        return None
    if not pilot and family != FASTEST:
        return None
    ranges = ((core_seconds, found["core_seconds"]), (size, found["bytes"]))
    outside = any(not low / NEAR <= value <= high * NEAR for value, (low, high) in ranges)
    near = [min(max(value, low / FARTHEST), high * FARTHEST) for value, (low, high) in ranges]
    ratio = features(family, near[0], round(near[1]), counted, pilot) @ found["coefficients"]
    center = min(counted) * math.exp(float(ratio))
    if family == FASTEST:  # whose counts stand beside the network: wherever one was chosen, it did no worse than they
        center = min(center, min(counted))
    spread = math.exp(WIDE * found["deviation"])
    return Prediction(center, center / spread, center * spread, outside)
