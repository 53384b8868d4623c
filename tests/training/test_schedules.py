"""The learning rate over a run: the named formulas, at their beginning, middle and end."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.config import preset
from quire.training.schedules import SCHEDULES, warmed_up

quick = settings(max_examples=60, deadline=None)
shares = st.floats(0, 1)


def nanogpt(step: int, peak: float, lowest: float, warmup: int, steps: int) -> float:
    """get_lr of nanoGPT's train.py."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > steps:
        return lowest
    decayed = (step - warmup) / (steps - warmup)
    return lowest + 0.5 * (1.0 + math.cos(math.pi * decayed)) * (peak - lowest)


@pytest.mark.parametrize(
    ("name", "values"),  # at progress 0, 1/4, 1/2, 3/4, 0.9, 1 with floor 0.1 and share 0.2
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 0.775, 0.55, 0.325, 0.19, 0.1]),
        (
            "cosine",
            [
                1,
                0.55 + 0.45 * math.sqrt(0.5),
                0.55,
                0.55 - 0.45 * math.sqrt(0.5),
                0.55 + 0.45 * math.cos(0.9 * math.pi),
                0.1,
            ],
        ),
        ("warmup-stable-decay", [1, 1, 1, 1, 0.55, 0.1]),
    ],
)
def test_values(name, values):
    found = [SCHEDULES[name](progress, 0.1, 0.2, 1.0) for progress in (0, 0.25, 0.5, 0.75, 0.9, 1)]
    assert found == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "inverse-square-root"])  # which has no end
@quick
@given(shares, st.floats(0.01, 1), shares)
def test_from_the_peak_down_to_the_floor(name, floor, share, progress):
    schedule = SCHEDULES[name]
    assert schedule(0.0, floor, share, 1.0) == pytest.approx(1)
    end = schedule(1.0, floor, share, 1.0)
    assert end == pytest.approx(1 if name == "constant" else floor)
    assert end - 1e-9 <= schedule(progress, floor, share, 1.0) <= 1 + 1e-9
    assert schedule(progress, floor, share, 1.0) >= schedule(min(1.0, progress + 0.01), floor, share, 1.0) - 1e-9


def test_the_warm_up_is_a_straight_rise():
    rise = [warmed_up(SCHEDULES["constant"], step, 4, 0.0, 0.1, 0.2) for step in range(7)]
    assert rise == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert warmed_up(SCHEDULES["constant"], 0, 0, 0.0, 0.1, 0.2) == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_times_the_schedule(name):
    """The schedule is a ceiling from the first step on: nothing jumps where the warm-up ends."""
    steps, warmup = 200, 20
    values = [warmed_up(SCHEDULES[name], step, warmup, step / steps, 0.1, 0.2) for step in range(steps)]
    for step in (0, warmup - 1, warmup, steps // 2, steps - 1):
        warm = min(1, (step + 1) / (warmup + 1))
        age = (step + 1) / (warmup + 1)
        assert values[step] == pytest.approx(warm * SCHEDULES[name](step / steps, 0.1, 0.2, age))
    assert all(abs(b - a) < 1 / warmup for a, b in itertools.pairwise(values))
    assert warmed_up(SCHEDULES[name], steps, warmup, 1.3, 0.1, 0.2) == warmed_up(
        SCHEDULES[name], steps, warmup, 1.0, 0.1, 0.2
    )


def test_cosine_without_warm_up_is_nanogpt_s():
    for step in range(0, 101, 5):
        ours = 6e-4 * warmed_up(SCHEDULES["cosine"], step, 0, step / 100, 0.1, 0.2)
        assert ours == pytest.approx(nanogpt(step, 6e-4, 6e-5, 0, 100), rel=1e-12)


@pytest.mark.parametrize(("size", "warmup"), [(512, 4000), (64, 10)])
def test_inverse_square_root_is_the_paper_s(size, warmup):
    """Equation 3 of Vaswani et al. 2017, whose steps count from 1; ours has its peak one step after warmup_steps."""
    peak = (size * warmup) ** -0.5
    for step in (1, 2, warmup // 2, warmup - 1, warmup, warmup + 1, 3 * warmup, 25 * warmup):
        theirs = size**-0.5 * min(step**-0.5, step * warmup**-1.5)
        ours = peak * warmed_up(SCHEDULES["inverse-square-root"], step - 1, warmup - 1, step / 1e5, 0.1, 0.2)
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_gpt2_s_preset_follows_nanogpt_s_rate():
    """Ours counts the cosine from the first step, nanoGPT's from the end of the warm-up: at most half a percent."""
    recipe = preset("gpt2")["training"]
    steps, warmup, peak = recipe["steps"], recipe["warmup_steps"], recipe["learning_rate"]
    places = [0, 1000, warmup - 1, warmup, 50_000, steps // 2, 550_000, steps]
    for step in places:
        share = warmed_up(SCHEDULES[recipe["schedule"]], step, warmup, step / steps, recipe["decay_floor"], 0.2)
        assert share * peak == pytest.approx(nanogpt(step, 6e-4, 6e-5, 2000, 600_000), rel=0.005)
    assert share * peak == pytest.approx(6e-5)
