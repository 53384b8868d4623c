"""Quire and nanoGPT on six texts, the same minutes of one core: held-out bits per byte, by one measure.

    python benchmarks/against_nanogpt.py --nanogpt CHECKOUT [--workers 2] [--minutes 1 3 10]
        [--only measure|tune|nanogpt|quire]

A cell is one thread pinned to one core; two may run at a time on two cores. nanoGPT is trained by characters on the
same text and measured on the same held-out part, in two shapes; its learning rate is tuned over four values at one
minute on two texts and then fixed. As it has no clock, its start and its steps are measured first (on a machine
that is otherwise quiet, with as many workers as later), and it gets the steps whose CPU seconds, those of its whole
process, are its minutes: never less than 97% of them. Where an earlier checkpoint than the last predicts the
held-out text better, that one counts, and finding it costs none of its time. For Quire wall time counts,
from the command's start to its exit. Ten minutes are run on two texts. Prints a table; each cell is a line of the
JSON lines file, and one that is there is not run again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from command import cores, machine, measured
from nanogpt import CPU_RECIPE, Peer, Settings, step_seconds
from texts import TEXTS, six_texts

Row = dict[str, Any]

# The scaled shape: twice the context, half as wide again, so 2.3 times the parameters and about four times the time of
# a step. More would leave it under a hundred steps in a minute of one core.
SHAPES: dict[str, Settings] = {
    "nanoGPT, CPU recipe": CPU_RECIPE,
    "nanoGPT, scaled": {**CPU_RECIPE, "block_size": 128, "n_head": 6, "n_embd": 192},
}
QUIRE: dict[str, list[str]] = {"quire train": [], "quire train --fastest": ["--fastest"]}
RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # 1e-3 is its configuration's; decayed to a tenth, as there
TUNED_ON, TUNED_FOR = ("jules-verne", "manpages-ru"), 1.0  # minutes
LONG, LONG_ON = 10.0, ("jules-verne", "python-library")  # minutes, and the texts for them
WARMUP = 0.05  # of its steps, as 100 of its recipe's 2,000
CHECKPOINTS = 8
LEAST, AIM = 0.97, 1.04  # of the budget, in CPU seconds: measuring errs by some percent, in nanoGPT's favour
ATTEMPTS = 4
PROBE = 24  # steps of the short run that measures one
SHOWN = ("learning_rate", "bits_per_byte", "steps", "wall_seconds", "cpu_seconds", "start_seconds", "step_seconds")
KEY = ("name", "text", "minutes", "learning_rate")


def main() -> None:
    """Run the cells that are missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--texts", type=Path, default=Path(tempfile.gettempdir(), "six-texts"), help="made there")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 3.0, LONG])
    parser.add_argument("--only", choices=["measure", "tune", "nanogpt", "quire"])
    parser.add_argument("--workers", type=int, default=1, help="cells at a time, each on a core of its own")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/against_nanogpt.jsonl"))
    given = parser.parse_args()
    results = Results(given.json)
    if given.only != "quire" and given.nanogpt is None:
        print("Without --nanogpt CHECKOUT (of karpathy/nanoGPT) its cells are not run.", file=sys.stderr)
    found = six_texts(given.texts)
    if given.nanogpt and given.only != "quire":
        peer = Nanogpt(given.nanogpt.resolve(), found, results)
        run(costs(given.minutes), peer.measure, results, given.workers)
        if given.only != "measure":
            run(tuning(), peer.cell, results, given.workers)
        if given.only not in ("measure", "tune"):
            run(nanogpt_cells(results.rows, given.minutes), peer.cell, results, given.workers)
    if given.only in (None, "quire"):
        run(quire_cells(given.minutes), lambda cell, core: quire(cell, found, core), results, given.workers)
    print(table(results.rows))


class Results:
    """The rows so far, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, row: Row) -> None:
        """Keep a row."""
        with self.lock:
            self.rows.append(row)
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")

    def done(self, cell: Row) -> bool:
        """Whether this cell is there."""
        return any(same(row, cell) for row in self.rows)


def same(row: Row, cell: Row) -> bool:
    """Whether a row is that of a cell."""
    return all(row.get(key) == cell.get(key) for key in KEY)


def run(cells: Iterable[Row], do: Callable[[Row, int], Row], results: Results, workers: int) -> None:
    """Do the missing cells, so many at a time, each on one of this machine's cores."""
    free: SimpleQueue[int] = SimpleQueue()
    for core in cores()[:workers]:
        free.put(core)

    def one(cell: Row) -> None:
        core = free.get()
        try:
            row = do(cell, core)
        except (RuntimeError, KeyError) as problem:  # the other cells go on; this one is tried at the next call
            print(f"{cell['name']}, {cell['text']}, {cell['minutes']:g} minutes: {problem!r}", file=sys.stderr)
            return
        finally:
            free.put(core)
        results.add(row)
        print(f"{row['name']:24}{row['text']:16}{row['minutes']:4g} minutes  " + ", ".join(
            f"{key} {row[key]:.5g}" for key in SHOWN if key in row), flush=True)  # fmt: skip

    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(one, [cell for cell in cells if not results.done(cell)]))
        except BaseException:  # Ctrl-C: the cells that wait are not begun
            pool.shutdown(cancel_futures=True)
            raise


# ---- which cells there are ----------------------------------------------------------------------------------------


def costs(minutes: Iterable[float]) -> list[Row]:
    """nanoGPT's steps, which are measured before they are counted: cells of no minutes."""
    needed = sorted({*TUNED_ON, *(text for _, text in lengths(minutes))})
    return [
        {"name": name, "text": text, "minutes": 0.0, "learning_rate": RATES[0]} for text in needed for name in SHAPES
    ]


def tuning() -> list[Row]:
    """nanoGPT's learning rates, on two texts."""
    return [
        {"name": name, "text": text, "minutes": TUNED_FOR, "learning_rate": rate}
        for rate in RATES for text in TUNED_ON for name in SHAPES
    ]  # fmt: skip


def lengths(minutes: Iterable[float]) -> list[tuple[float, str]]:
    """Minutes and text of what is compared, the short ones first."""
    return [(m, text) for m in sorted(minutes) for text in TEXTS if m < LONG or text in LONG_ON]


def nanogpt_cells(rows: list[Row], minutes: Iterable[float]) -> list[Row]:
    """nanoGPT in both shapes at the rate found for each."""
    rates = {name: best_rate(rows, name) for name in SHAPES}
    return [
        {"name": name, "text": text, "minutes": m, "learning_rate": rate}
        for m, text in lengths(minutes) for name, rate in rates.items() if rate is not None
    ]  # fmt: skip


def best_rate(rows: list[Row], name: str) -> float | None:
    """The tuned learning rate of a shape: the lowest mean over the texts it was tuned on; None until all are there."""
    sums = {
        rate: [row["bits_per_byte"] for row in rows if row["name"] == name and row["text"] in TUNED_ON
               and row["minutes"] == TUNED_FOR and row["learning_rate"] == rate]
        for rate in RATES
    }  # fmt: skip
    whole = all(len(found) == len(TUNED_ON) for found in sums.values())
    return min(RATES, key=lambda rate: sum(sums[rate])) if whole else None


def quire_cells(minutes: Iterable[float]) -> list[Row]:
    """Quire with and without --fastest."""
    return [{"name": name, "text": text, "minutes": m} for m, text in lengths(minutes) for name in QUIRE]


# ---- a cell -------------------------------------------------------------------------------------------------------


class Nanogpt:
    """nanoGPT's cells; knows what its steps cost from those that were measured."""

    def __init__(self, checkout: Path, found: dict[str, Path], results: Results) -> None:
        self.checkout, self.found, self.results = checkout, found, results

    def peer(self, cell: Row, folder: str) -> Peer:
        """A copy with the text of a cell."""
        return Peer.copied(self.checkout, Path(folder, "nanogpt"), self.found[cell["text"]].read_text("utf-8"))

    def measure(self, cell: Row, core: int) -> Row:
        """CPU seconds of a step, and of all else (start-up, evaluations, checkpoints), by one short run."""
        with tempfile.TemporaryDirectory() as folder:
            probe = {**settings(cell, PROBE), "log_interval": 1}
            output, used = self.peer(cell, folder).train(probe, core, clock="process_time")
        step = statistics.median(step_seconds(output))
        return {**cell, "start_seconds": round(used["cpu_seconds"] - PROBE * step, 3), "step_seconds": round(step, 5)}

    def cell(self, cell: Row, core: int) -> Row:
        """Train one; again with more steps where its CPU seconds fell short of the budget.

        On a machine busy with other things they may be more than the budget: it has the steps that were measured.
        """
        budget = cell["minutes"] * 60
        measured_as = {**cell, "minutes": 0.0, "learning_rate": RATES[0]}
        costs = next((row for row in self.results.rows if same(row, measured_as)), None)
        if costs is None:
            raise RuntimeError("its steps could not be measured")
        step = costs["step_seconds"]
        with tempfile.TemporaryDirectory() as folder:
            peer = self.peer(cell, folder)
            for _ in range(ATTEMPTS):
                steps = affordable(budget, costs["start_seconds"], step)
                _, used = peer.train(settings(cell, steps), core)
                if used["cpu_seconds"] >= LEAST * budget:
                    break
                step = (used["cpu_seconds"] - costs["start_seconds"]) / steps
            loss, best = peer.loss()
            return {
                **cell, "bits_per_byte": round(peer.bits_per_byte(loss), 5), "loss": round(loss, 5), "steps": steps,
                "best_step": best, **used, "machine": machine(), "at": time.strftime("%Y-%m-%d %H:%M"),
            }  # fmt: skip


def settings(cell: Row, steps: int) -> Settings:
    """nanoGPT's flags for so many steps; it makes one more, behind its last evaluation."""
    rate = cell["learning_rate"]
    return {
        **SHAPES[cell["name"]], "learning_rate": rate, "min_lr": rate / 10, "max_iters": steps, "lr_decay_iters": steps,
        "warmup_iters": int(steps * WARMUP), "eval_interval": max(1, steps // CHECKPOINTS), "eval_iters": 1,
        "always_save_checkpoint": True, "log_interval": 100,
    }  # fmt: skip


def affordable(budget: float, start: float, step: float) -> int:
    """How many steps fit a budget of seconds: a multiple of the checkpoints, so that the last is the end."""
    return max(1, int((AIM * budget - start) / step / CHECKPOINTS)) * CHECKPOINTS


def quire(cell: Row, found: dict[str, Path], core: int) -> Row:
    """`quire train TEXT --minutes M`, nothing in its cache."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", str(found[cell["text"]].resolve()), "--minutes", f"{cell['minutes']:g}", "--threads", "1"]
        command = [sys.executable, "-m", "quire", *words, *QUIRE[cell["name"]], "--run", f"{folder}/run", "--json"]
        output, used = measured(command, folder, core, QUIRE_CACHE=f"{folder}/cache")
    result = json.loads(output)
    keep = {"bits_per_byte": result["bits_per_byte"], "loss": result["validation_loss"], "steps": result["steps"]}
    return {**cell, **keep, **used, "machine": machine(), "at": time.strftime("%Y-%m-%d %H:%M")}


# ---- the table ----------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Held-out bits per byte in Markdown: a line for a text and minutes, nanoGPT at its tuned rates."""
    names = [*SHAPES, *QUIRE]
    fixed = {name: best_rate(rows, name) for name in SHAPES}
    lines = ["| text | minutes | " + " | ".join(names) + " | lower |", "|---" * (len(names) + 3) + "|"]
    for m, text in sorted({(row["minutes"], row["text"]) for row in rows if row["minutes"]}):
        here = {
            row["name"]: row["bits_per_byte"] for row in rows
            if (row["minutes"], row["text"]) == (m, text) and row.get("learning_rate") == fixed.get(row["name"])
        }  # fmt: skip
        theirs, ours = ([here[name] for name in group if name in here] for group in (SHAPES, QUIRE))
        verdict = "" if not theirs or not ours else "yes" if max(ours) < min(theirs) else "no"
        cells = [f"{here[name]:.3f}" if name in here else "" for name in names]
        lines.append(f"| {text} | {m:g} | " + " | ".join(cells) + f" | {verdict} |")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in fixed.items() if rate is not None)
    return "\n".join([*lines, "", f"Learning rates found by tuning: {rates or 'not yet'}."])


if __name__ == "__main__":
    main()
