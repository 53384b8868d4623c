"""A run's metrics as a curve to plot."""

from quire.errors import choose
from quire.plots.loss import Curve
from quire.run import Run

AXES = {"step": "step", "tokens": "tokens", "time": "seconds"}  # axis and the key of metrics.jsonl it shows


def curve(run: Run, axis: str, bits_per_byte: bool = False) -> Curve:
    """Training and held-out loss of a run over steps, tokens or time (seconds); or held-out bits per byte alone."""
    x = AXES[choose("--over", axis, list(AXES))]
    y = "validation_bits_per_byte" if bits_per_byte else "validation_loss"
    rows = run.metrics()
    training = [(row[x], row["train_loss"]) for row in rows if row["train_loss"] is not None and not bits_per_byte]
    return Curve(run.path.name, training, [(row[x], row[y]) for row in rows if row.get(y) is not None])
