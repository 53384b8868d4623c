"""In plain words, what a run's losses say: still improving, converged, or overfitting, and what to do about it."""

from typing import Any

STILL = 0.01  # a held-out loss that fell by this share over the last fifth of a run is still falling
READ = 0.1  # share of the text before which nothing has converged
RISEN = 0.01  # a held-out loss this share above its best has risen


def verdict(metrics: list[dict[str, Any]], epochs: float, resume: str, mixed: bool = False) -> str:
    """One or two sentences about the evaluations in `metrics` (lines of metrics.jsonl).

    `epochs` is how often the text was read, `resume` the command that trains the run further. `mixed` is True where
    the held-out loss is not the network's alone, as the training loss is: the two are not compared then.
    """
    evaluated = with_training_loss(metrics)
    if len(evaluated) < 2:
        return "Too few evaluations to say how training goes: train longer."
    best = min(evaluated, key=lambda row: row["validation_loss"])
    last = evaluated[-1]
    lowest, final, train = best["validation_loss"], last["validation_loss"], last["train_loss"]
    if final > lowest * (1 + RISEN) and train < best["train_loss"]:
        recited = f" after reading it {epochs:.0f} times" if epochs >= 2 else ""
        return (
            f"Overfitting since step {best['step']}: the held-out loss rose from {lowest:.3f} to {final:.3f} while the"
            f" training loss fell to {train:.3f}; the model is learning the text by heart{recited}. The best checkpoint"
            " is kept. More text, a smaller model, more --model.dropout or fewer steps help."
        )
    earlier = [row for row in evaluated if row["step"] <= 0.8 * last["step"]] or evaluated[:1]
    fall = earlier[-1]["validation_loss"] - final
    if fall > STILL * final:
        return (
            f"Still improving: the held-out loss fell by {fall:.3f} in the last part of the run."
            f" Train on with: {resume} --minutes 5"
        )
    if epochs < READ:
        return (
            f"The run read only {epochs:.0%} of its text: too little to say where it would end."
            f" Train on with: {resume} --minutes 5"
        )
    if not mixed and train < 0.7 * final:
        return (
            f"Converged, with a training loss of {train:.3f} far below the held-out {final:.3f}: the model knows its"
            " text better than the language. More text or more --model.dropout help, more steps will not."
        )
    return f"Converged: the held-out loss fell by only {max(fall, 0):.3f} at the end. A larger model would go further."


def with_training_loss(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with an evaluation, each with the mean training loss of all steps since the evaluation before."""
    evaluated, step, total, since = [], 0, 0.0, 0
    for row in metrics:
        if row["train_loss"] is not None:
            total += row["train_loss"] * (row["step"] - step)
            since += row["step"] - step
        step = row["step"]
        if row.get("validation_loss") is not None and since:
            evaluated.append({**row, "train_loss": total / since})
            total, since = 0.0, 0
    return evaluated
