"""How honest the planner is: six texts, three times; what `quire plan` foretold, and what `quire train` then came to.

    python benchmarks/plan_honesty.py [--minutes 0.25 1 3] [--texts FOLDER] [--fastest] [--again]

Each cell is two commands, as a person would call them: `quire plan FILE --minutes M --json`, then `quire train FILE
--minutes M --json`. The time is wall time of the whole command, CPU seconds beside it. Cells that are in the JSON
already are not done again; with --again their plans are, as after a new fit of the table, which sees nothing of what
the trainings came to. The sweep that the predictions are fitted to (benchmarks/sweep.py) has none of these texts.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from command import ROOT, machine, quire
from texts import six_texts

TIME_SHARE, TIME_SECONDS, BITS_SHARE = 0.05, 3.0, 0.05  # the promise: within this share of the time, or these seconds


def cell(name: str, text: Path, minutes: float, fastest: bool) -> dict[str, Any]:
    """One text and time: foretold, and come to."""
    words = words_of(text, minutes, fastest)
    with tempfile.TemporaryDirectory() as folder:
        told = foretold(text, minutes, fastest)
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        trained = quire(["train", *words, "--run", "run"], folder)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "text": name, "minutes": minutes, "fastest": fastest, **told,
        "bits_per_byte": trained["bits_per_byte"], "steps": trained["steps"], "seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
    }  # fmt: skip


def words_of(text: Path, minutes: float, fastest: bool) -> list[str]:
    """What both commands are called with."""
    return [str(text.resolve()), "--minutes", f"{minutes:g}", "--json", *(["--fastest"] if fastest else [])]


def foretold(text: Path, minutes: float, fastest: bool) -> dict[str, Any]:
    """What `quire plan` says."""
    with tempfile.TemporaryDirectory() as folder:
        plan = quire(["plan", *words_of(text, minutes, fastest)], folder)
    found = plan["prediction"] or {"bits_per_byte": None, "low": None, "high": None, "extrapolated": None}
    return {
        "recipe": plan["recipe"], "contention": plan["contention"],
        "foretold_bits": found["bits_per_byte"], "low": found["low"], "high": found["high"],
        "extrapolated": found["extrapolated"], "foretold_steps": plan["steps"], "foretold_seconds": plan["seconds"],
    }  # fmt: skip


def kept(row: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the time was met, and the bits per byte."""
    late = abs(row["seconds"] - row["foretold_seconds"])
    met = late <= max(TIME_SECONDS, TIME_SHARE * row["foretold_seconds"])
    return met, bool(row["foretold_bits"]) and abs(row["bits_per_byte"] / row["foretold_bits"] - 1) <= BITS_SHARE


def show(row: dict[str, Any]) -> None:
    """A line of the table, in Markdown: docs/planning.md has it."""
    off = f"{row['bits_per_byte'] / row['foretold_bits'] - 1:+.1%}" if row["foretold_bits"] else "-"
    foretold = f"{row['foretold_bits']:.3f} ({row['low']:.3f} to {row['high']:.3f})" if row["foretold_bits"] else "-"
    met, right = kept(row)
    what = f"{row['text']} | {row['minutes']:g} | {row['recipe']}"
    times = f"{row['foretold_seconds']:.0f} | {row['seconds']:.1f}"
    words = " and ".join(f"{name} {'kept' if ok else 'missed'}" for name, ok in (("time", met), ("bits", right)))
    print(f"| {what} | {times} | {foretold} | {row['bits_per_byte']:.3f} | {off} | {words} |", flush=True)


def main() -> None:
    """Do the cells that are missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[0.25, 1.0, 3.0])
    parser.add_argument("--texts", type=Path, default=Path(tempfile.gettempdir()) / "six-texts", help="made if missing")
    parser.add_argument("--fastest", action="store_true", help="the recipes with n-grams beside it")
    parser.add_argument("--again", action="store_true", help="the plans of the trainings that are there")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "plan_honesty.json")
    given = parser.parse_args()
    rows = json.loads(given.json.read_text())["rows"] if given.json.exists() else []
    texts = six_texts(given.texts)
    if given.again:
        for row in rows:
            told = foretold(texts[row["text"]], row["minutes"], row["fastest"])
            row |= told if told["recipe"] == row["recipe"] else {"recipe": ""}
        rows = [row for row in rows if row["recipe"]]  # of another recipe the training is to be done again
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    done = {(row["text"], row["minutes"], row["fastest"]) for row in rows}
    print(
        "| text | minutes | recipe | seconds foretold | seconds | bits per byte foretold | bits per byte | off | kept |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        show(row)
    for minutes in sorted(given.minutes):
        for name, text in texts.items():
            if (name, minutes, given.fastest) not in done:
                rows.append(cell(name, text, minutes, given.fastest))
                show(rows[-1])
                given.json.parent.mkdir(parents=True, exist_ok=True)
                given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    results = [kept(row) for row in rows]
    print(f"Of {len(rows)}: {sum(met for met, _ in results)} times met, {sum(ok for _, ok in results)} bits per byte.")


if __name__ == "__main__":
    main()
