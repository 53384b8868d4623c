"""The README's first picture: held-out loss against seconds on tiny-shakespeare, Quire and its peers.

    python benchmarks/curve.py --text ../shared/data/tinyshakespeare.txt --nanogpt CHECKOUT [--minutes 0.25 0.5 1 2 4]

A dot of Quire's is a whole run, `quire train TEXT --minutes M`: its seconds from start to exit, and the loss over the
whole held-out tenth. nanoGPT's line are its own estimates while its recipe for CPUs trains, ending in the loss over the
whole. Runs are kept in the JSON file of goals.py, and not made again;
--draw makes none, and draws those that are there.
"""

import argparse
import math
import sys
from pathlib import Path

from baselines import BASELINES
from goals import FASTEST, PURE
from runs import Run, Runs

from quire import files
from quire.plots.loss import COLOURS

Point = tuple[float, float]  # seconds, nats per character

OURS = {"Quire --fastest, with n-grams beside it": FASTEST, "Quire, a pure Transformer": PURE}
PEER = "nanoGPT, its CPU recipe"
GREYS = {"Kneser-Ney, 8-grams": "#8a8f98", "PPMd, order 6": "#5c5f66"}
TOP = 2.6  # nats; what is above it is the first seconds of any model


def main() -> None:
    """Make the runs that are missing, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path("../shared/data/tinyshakespeare.txt"))
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--minutes", type=float, nargs="+", default=[0.15, 0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/goals.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/loss-against-seconds.png"))
    parser.add_argument("--draw", action="store_true", help="only draw the runs there are")
    given = parser.parse_args()
    runs = Runs(given.json, given.text, given.nanogpt and given.nanogpt.resolve())
    if not given.draw:
        runs.nanogpt()
        for name in BASELINES:
            runs.baseline(name)
        for minutes in given.minutes:
            for flags in OURS.values():
                runs.quire(flags, minutes)
    lines = drawn(runs.kept["runs"])
    if not lines:
        sys.exit(f"{given.json} has no runs. Leave --draw out.")
    levels = {name: runs.kept["runs"][name]["loss"] for name in BASELINES if name in runs.kept["runs"]}
    picture(lines, levels, given.picture)


def drawn(kept: dict[str, Run]) -> dict[str, list[Point]]:
    """Name -> points (seconds, loss): Quire's are ends of runs with the first seed, nanoGPT's are those of one run."""
    lines = {}
    for name, flags in OURS.items():
        prefix = Runs.called(flags)
        mine = [run for key, run in kept.items() if key.startswith(prefix) and key.endswith(" --seed 1")]
        ends = sorted((run["wall_seconds"], run["loss"]) for run in mine)
        if ends:
            lines[name] = ends
    theirs = [run for key, run in kept.items() if key.startswith("nanoGPT, CPU recipe")]
    if theirs:
        run = sorted(theirs, key=lambda run: run["wall_seconds"])[len(theirs) // 2]  # the one of median time
        wall = run["wall_seconds"]
        lines[PEER] = [*((seconds, loss) for seconds, loss in run["curve"]), (wall, run["loss"])]
    return lines


def picture(lines: dict[str, list[Point]], levels: dict[str, float], path: Path) -> None:
    """Draw the lines over seconds on a logarithmic axis, and the levels of those that only count, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), dpi=110, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    seen = {name: [point for point in points if point[1] <= TOP] or points for name, points in lines.items()}
    times = [seconds for points in seen.values() for seconds, _ in points]
    first, last = min(times), max(times)
    for (name, points), colour in zip(seen.items(), COLOURS):
        axes.plot(*zip(*points), color=colour, linewidth=2, marker="o", markersize=4, label=name)
        seconds, loss = points[-1]
        axes.annotate(f"{loss:.2f}", (seconds, loss), (6, 0), color=colour, textcoords="offset points", va="center")
    for name, level in levels.items():
        axes.axhline(level, color=GREYS.get(name, "grey"), linestyle="--", linewidth=1)
        about = {"color": GREYS.get(name, "grey"), "ha": "center", "va": "bottom", "fontsize": 9}
        axes.text(math.sqrt(first * last), level, f"{name}: {level:.2f}", **about)
    axes.set_xscale("log")
    axes.set_xlim(first * 0.8, last * 1.3)
    ticks = [t for t in (5, 10, 15, 30, 60, 120, 240, 480, 900, 1800, 3600) if first * 0.8 <= t <= last * 1.3]
    axes.set_xticks(ticks, [f"{t} s" if t < 60 else f"{t // 60} min" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(min([*levels.values(), *(loss for points in seen.values() for _, loss in points)]) - 0.04)
    axes.set_xlabel("from the command's start to its exit, two CPU cores")
    axes.set_ylabel("held-out loss (nats per character)")
    axes.set_title("tiny-shakespeare: loss against time", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    files.write_by(path, lambda new: figure.savefig(new, format="png"))


if __name__ == "__main__":
    main()
