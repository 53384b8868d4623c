"""Loss curves: training and held-out loss, of one run or of several."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire import files

COLOURS = ("#1f6feb", "#d1495b", "#2e8b57", "#b8860b", "#7b4fb5", "#0b7285", "#c2571a", "#5c5f66")


@dataclass
class Curve:
    """One run's losses: points (x, nats per token), x being what the plot's axis says."""

    name: str
    training: list[tuple[float, float]] = field(default_factory=list)
    validation: list[tuple[float, float]] = field(default_factory=list)


def plot_losses(curves: Sequence[Curve], axis: str, path: Path, unit: str = "nats per token") -> None:
    """Draw the curves into a PNG: held-out loss as a line with its best point marked, training loss thin behind it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, curve in enumerate(curves):
        _draw(axes, curve, COLOURS[index % len(COLOURS)], alone=len(curves) == 1)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"loss ({unit})")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _focus(axes, curves)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    files.write_by(path, lambda new: figure.savefig(new, format="png"))


def _draw(axes: Any, curve: Curve, colour: str, alone: bool) -> None:
    if curve.training:
        label = "training" if alone else None
        axes.plot(*zip(*curve.training, strict=True), color=colour, alpha=0.45, linewidth=1, label=label)
    if curve.validation:
        colour = COLOURS[1] if alone else colour
        x, y = min(curve.validation, key=lambda point: point[1])
        name = "held out" if alone else curve.name
        axes.plot(
            *zip(*curve.validation, strict=True),
            color=colour,
            marker="o",
            markersize=3,
            linewidth=1.8,
            label=f"{name}, best {y:.3f}",
        )
        axes.plot([x], [y], marker="*", markersize=13, color=colour, markeredgecolor="white")
        if alone:
            axes.set_title(curve.name, fontsize=11)


def _focus(axes: Any, curves: Sequence[Curve]) -> None:
    """Leave out the first steep fall, which would flatten all the rest."""
    values = [y for curve in curves for _, y in curve.training + curve.validation]
    if len(values) >= 8:
        low, high = min(values), sorted(values)[int(0.97 * (len(values) - 1))]
        first = max((curve.validation[0][1] for curve in curves if curve.validation), default=high)
        axes.set_ylim(low - 0.05 * (high - low), max(high, first) + 0.05 * (high - low))
