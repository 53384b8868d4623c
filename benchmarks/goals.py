"""Tiny-shakespeare on this machine: how soon Quire is where nanoGPT gets, and how far it gets in the same time.

    python benchmarks/goals.py --text ../shared/data/tinyshakespeare.txt --nanogpt CHECKOUT [--only ROW ...]
        [--device cpu|cuda]

Losses are nats per character over the whole held-out last tenth; times are of the whole process, from start to exit,
start-up and evaluations included. A run has a learning rate that falls to nothing at its end, so the time to a loss is
the smallest --minutes whose run ends at or below it, with every one of three seeds; found among the row's minutes by
bisection. nanoGPT's time to a loss is that of its first estimate at or below it, or of all its run where there is none.
Runs over ten minutes are made with one seed. Rows and runs that the JSON file has are not made again:
delete it once the recipes have changed.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines import BASELINES
from runs import Run, Runs

NANOGPT_CPU, NANOGPT_BEST = 1.898, 1.4697  # whole-split loss of its recipe for CPUs; what it publishes for a GPU
SEEDS, LONG = (1, 2, 3), 10.0  # minutes; a longer run has one seed
PEER_SEEDS = (1337, 1, 2)
KNESER_NEY, PPMD = BASELINES

# What Quire is called with: one line to change for all rows.
PURE: list[str] = []  # the best Transformer that every neighbour can load
FASTEST = ["--fastest"]  # n-grams beside it


@dataclass(frozen=True)
class Row:
    """A line of the table: what is measured, with which flags, over which minutes; the goal in words and as a test."""

    measure: Callable[["Row", Runs], dict[str, Any]]
    flags: list[str]
    goal: str
    met: Callable[[dict[str, Any]], bool]
    target: float = 0.0  # the loss to reach, if that is what is timed
    minutes: Sequence[float] = ()
    peer: str = ""  # nanoGPT's recipe that is timed beside it
    device: str = "cpu"

    def made_by(self) -> dict[str, Any]:
        """What a kept row must agree with."""
        return {"flags": self.flags, "target": self.target, "minutes": list(self.minutes), "goal": self.goal}


def main() -> None:
    """Make the rows that are missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path("../shared/data/tinyshakespeare.txt"))
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--json", type=Path, help="benchmarks/results/goals.json, or goals_cuda.json")
    given = parser.parse_args()
    path = given.json or Path(f"benchmarks/results/goals{'_cuda' * (given.device == 'cuda')}.json")
    runs = Runs(path, given.text, given.nanogpt and given.nanogpt.resolve(), given.device)
    for name in given.only:
        if ROWS[name].device == given.device:
            make(name, ROWS[name], runs)
    print(table(runs.kept.get("rows", {})))


def make(name: str, row: Row, runs: Runs) -> None:
    """One row, unless it is there and was made in the same way."""
    rows = runs.kept.setdefault("rows", {})
    if name in rows and rows[name]["made_by"] == row.made_by() and row.measure is not best:
        return
    found = row.measure(row, runs)
    if found:
        rows[name] = {
            **found,
            "goal": row.goal,
            "met": found["ours"] is not None and row.met(found),
            "made_by": row.made_by(),
        }
        runs.save()


# ---- measures: each gives "ours", "unit", "spread", and "peer" with its "ratio" where there is one -----------------


def time_to(row: Row, runs: Runs) -> dict[str, Any]:
    """Seconds of the shortest run that ends at or below the target with every seed, beside the peer's."""
    peers = nanogpt(runs, row.peer) if row.peer else []
    shortest = first_that_holds(
        row.minutes,
        lambda minutes: runs.quire(row.flags, minutes)["loss"] <= row.target,
        lambda minutes: all(run["loss"] <= row.target for run in seeds(row.flags, minutes, runs)),
    )
    if shortest is None:
        longest = runs.quire(row.flags, max(row.minutes))
        note = f"not in {max(row.minutes):g} minutes: {longest['loss']:.4f}"
        return {"ours": None, "unit": "s", "spread": None, "note": note, "curve": longest["curve"]}
    ours = seeds(row.flags, shortest, runs)
    found = {**figure([run["wall_seconds"] for run in ours]), "unit": "s", "minutes": shortest}
    found |= {
        "losses": [run["loss"] for run in ours],
        "cpu_seconds": median(ours, "cpu_seconds"),
        "curve": ours[0]["curve"],
    }
    if peers:
        theirs = statistics.median(seconds_to(row.target, run) for run in peers)
        found |= {"peer": theirs, "peer_name": f"nanoGPT's {row.peer}", "ratio": found["ours"] / theirs}
    return found


def seconds_to(loss: float, run: Run) -> float:
    """When its own estimate was first at or below a loss; all its time where it never was."""
    return next((seconds for seconds, estimate in run["curve"] if estimate <= loss), run["wall_seconds"])


def in_nanogpts_time(row: Row, runs: Runs) -> dict[str, Any]:
    """Loss in the wall time that nanoGPT's recipe for CPUs takes here; its loss is the peer's."""
    peers = nanogpt(runs)
    if not peers:
        print("The loss in nanoGPT's time needs --nanogpt CHECKOUT (of karpathy/nanoGPT).")
        return {}
    minutes = round(median(peers, "wall_seconds") / 60, 2)
    ours = seeds(row.flags, minutes, runs)
    found = {**figure([run["loss"] for run in ours]), "unit": "nats", "minutes": minutes}
    found |= {"cpu_seconds": median(ours, "cpu_seconds"), "kneser_ney": runs.baseline(KNESER_NEY)["loss"]}
    theirs = median(peers, "loss")
    return found | {"peer": theirs, "peer_name": "nanoGPT's CPU recipe", "ratio": found["ours"] / theirs}


def best(row: Row, runs: Runs) -> dict[str, Any]:
    """The lowest loss of all runs that the other rows made; PPMd's is the peer's."""
    made = runs.all_of(row.flags)
    ours = min(made, key=lambda run: run["loss"])
    theirs = runs.baseline(PPMD)["loss"]
    found = {**figure([ours["loss"]]), "unit": "nats", "minutes": ours["minutes"], "curve": ours["curve"]}
    found |= {"of": len(made), "cpu_seconds": ours["cpu_seconds"]}
    return found | {"peer": theirs, "peer_name": PPMD, "ratio": found["ours"] / theirs}


def peer(row: Row, runs: Runs) -> dict[str, Any]:
    """nanoGPT's recipe itself: its time; its losses beside it."""
    made = nanogpt(runs)
    if not made:
        return {}
    found = {**figure([run["wall_seconds"] for run in made]), "unit": "s", "losses": [run["loss"] for run in made]}
    return found | {"cpu_seconds": median(made, "cpu_seconds")}


def baselines(row: Row, runs: Runs) -> dict[str, Any]:
    """Kneser-Ney's loss, and PPMd's as the peer's."""
    ours, theirs = (runs.baseline(name)["loss"] for name in BASELINES)
    return {**figure([ours]), "unit": "nats", "peer": theirs, "peer_name": PPMD, "ratio": ours / theirs}


def first_that_holds(
    ordered: Sequence[float], holds: Callable[[float], bool], surely: Callable[[float], bool]
) -> float | None:
    """The first of ascending values at which `holds`, by bisection, then on to the first at which `surely` does too.

    `holds` is taken to stay true once it is; None where no value will do.
    """
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(ordered[middle]) else (middle + 1, high)
    return next((value for value in ordered[low:] if surely(value)), None)


def seeds(flags: list[str], minutes: float, runs: Runs) -> list[Run]:
    """Runs with three seeds, or one where they are long."""
    return [runs.quire(flags, minutes, seed) for seed in (SEEDS if minutes <= LONG else SEEDS[:1])]


def nanogpt(runs: Runs, recipe: str = "CPU recipe") -> list[Run]:
    """One of nanoGPT's recipes with three seeds; none without a checkout."""
    return [run for seed in PEER_SEEDS if (run := runs.nanogpt(seed, recipe)) is not None]


def median(runs: list[Run], key: str) -> float:
    """Of one of their figures."""
    return statistics.median(run[key] for run in runs)


def figure(values: list[float]) -> dict[str, Any]:
    """The median, and the span of several."""
    span = [min(values), max(values)] if len(values) > 1 else None
    return {"ours": statistics.median(values), "spread": span, "seeds": len(values)}


# ---- rows ---------------------------------------------------------------------------------------------------------

SHORT = (0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75, 1.0, 1.5)
MIDDLE = (0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
LONGER = (2.0, 4.0, 5.0)

ROWS = {
    "nanogpt": Row(peer, [], "1.898 in 116 s, as measured elsewhere", lambda found: True),
    "baselines": Row(baselines, [], "the losses to be beaten", lambda found: True),
    "time-to-1.898": Row(
        time_to, FASTEST, "at most 1/15 of nanoGPT's time", lambda found: found.get("ratio", 1) <= 1 / 15,
        NANOGPT_CPU, SHORT, "CPU recipe",
    ),
    "time-to-1.898-pure": Row(
        time_to, PURE, "at most 1/5 of nanoGPT's time", lambda found: found.get("ratio", 1) <= 1 / 5,
        NANOGPT_CPU, SHORT, "CPU recipe",
    ),
    "nanogpt-time": Row(
        in_nanogpts_time, FASTEST, "at most 1.48 and below Kneser-Ney",
        lambda found: found["ours"] <= min(1.48, found["kneser_ney"]),
    ),
    "nanogpt-time-pure": Row(in_nanogpts_time, PURE, "at most 1.58", lambda found: found["ours"] <= 1.58),
    "time-to-1.4697": Row(
        time_to, FASTEST, "at most 180 s", lambda found: found["ours"] <= 180, NANOGPT_BEST, MIDDLE
    ),
    "time-to-1.4697-pure": Row(
        time_to, PURE, "as soon as it can", lambda found: found["ours"] <= 3600, NANOGPT_BEST, LONGER
    ),
    "best": Row(best, FASTEST, "below PPMd's 1.404", lambda found: found["ours"] < found["peer"]),
    "best-pure": Row(best, PURE, "below 1.4697", lambda found: found["ours"] < NANOGPT_BEST),
    "gpu-time-to-1.4697": Row(
        time_to, FASTEST, "at most 1/10 of nanoGPT's time", lambda found: found.get("ratio", 1) <= 1 / 10,
        NANOGPT_BEST, SHORT, "GPU recipe", "cuda",
    ),
    "gpu-time-to-1.4697-pure": Row(
        time_to, PURE, "at most 1/10 of nanoGPT's time", lambda found: found.get("ratio", 1) <= 1 / 10,
        NANOGPT_BEST, SHORT, "GPU recipe", "cuda",
    ),
}  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows there are, in Markdown."""
    lines = ["| row | ours | from to | seeds | peer | ratio | goal | met |", "|---" * 8 + "|"]
    for name in (name for name in ROWS if name in rows):
        row = rows[name]
        digits = 1 if row["unit"] == "s" else 4
        span = " to ".join(f"{value:.{digits}f}" for value in row["spread"] or [])
        ours = row.get("note") or f"{row['ours']:.{digits}f} {row['unit']}"
        theirs = f"{row['peer']:.{digits}f}, {row['peer_name']}" if "peer" in row else ""
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        verdict = "yes" if row["met"] else "no"
        lines.append(
            f"| {name} | {ours} | {span} | {row.get('seeds', '')} | {theirs} | {ratio} | {row['goal']} | {verdict} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
