"""A verdict says what the losses show, whoever drew them."""

import pytest

from quire.training.verdict import verdict


def metrics(training, held_out):
    """A line every 10 steps, each with an evaluation."""
    rows = zip(training, held_out, strict=True)
    return [{"step": 10 * n, "train_loss": a, "validation_loss": b} for n, (a, b) in enumerate(rows, 1)]


IMPROVING = metrics([3 - 0.2 * n for n in range(10)], [3 - 0.19 * n for n in range(10)])
CONVERGED = metrics([3, 2, 1.8, 1.7, *[1.65] * 6], [3, 2.1, 1.9, 1.8, *[1.78] * 6])
MEMORIZED = metrics([3, 2, 1.5, 1.2, 1.1, *[1.0] * 5], [3, 2.1, 1.9, 1.8, *[1.78] * 6])
OVERFITTING = metrics([3 - 0.3 * n for n in range(10)], [3, 2.5, 2.2, 2.0, 2.05, 2.1, 2.2, 2.3, 2.4, 2.5])
NOISY = metrics([3, 2.5, 2.2, *[2.0] * 7], [3, 2.6, 2.3, 2.1, *[2.09, 2.1, 2.095, 2.1, 2.092, 2.1]])


@pytest.mark.parametrize(
    ("rows", "begins", "advice"),
    [
        (IMPROVING, "Still improving", "quire resume runs/a --minutes 5"),
        (CONVERGED, "Converged", "A larger model"),
        (MEMORIZED, "Converged", "More text or more --model.dropout"),
        (OVERFITTING, "Overfitting since step 40", "More text, a smaller model, more --model.dropout or fewer steps"),
        (NOISY, "Converged", ""),
        (IMPROVING[:1], "Too few evaluations", "train longer"),
        ([], "Too few evaluations", "train longer"),
    ],
)
def test_verdict_and_advice(rows, begins, advice):
    said = verdict(rows, 1.0, "quire resume runs/a")
    assert said.startswith(begins) and advice in said


@pytest.mark.parametrize(("epochs", "recited"), [(1.0, False), (40.2, True)])
def test_a_small_text_that_is_recited(epochs, recited):
    said = verdict(OVERFITTING, epochs, "")
    assert "by heart" in said and ("after reading it 40 times" in said) is recited


def test_lines_between_the_evaluations_do_not_change_it():
    between = [{**row, "step": row["step"] - 5} for row in OVERFITTING]
    for row in between:
        del row["validation_loss"]
    mixed = sorted([*between, *OVERFITTING], key=lambda row: row["step"])
    assert verdict(mixed, 1.0, "") == verdict(OVERFITTING, 1.0, "")


def test_one_passed_over_step_does_not_upset_it():
    rows = [dict(row) for row in CONVERGED]
    rows[3]["train_loss"] = None
    assert verdict(rows, 1.0, "").startswith("Converged")
