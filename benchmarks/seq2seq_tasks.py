"""The tasks of pairs, each trained by its preset and measured on the pairs it never saw.

    python benchmarks/seq2seq_tasks.py [--tasks copy reverse ...] [--json FILE]

Each task is the command that a person would give, `quire train --preset seq2seq-TASK`, then `quire evaluate
--translations`: greedy, and right only to the letter. Times are of both commands whole, reading, encoding, measuring
and starting Python included; CPU seconds stand beside the wall's, since shared machines are noisy.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quire.data.tasks import TASKS
from quire.devices import usable_cores

RESULTS = Path(__file__).parent / "results" / "seq2seq_tasks.json"
WANTED, MINUTES = 0.99, 3.0


def called(*words: str) -> tuple[dict, float, float]:
    """What `quire WORDS --json` prints, its wall seconds and its CPU seconds."""
    began, before = time.monotonic(), os.times()
    done = subprocess.run([sys.executable, "-m", "quire", *words, "--json"], capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        sys.exit(f"quire {' '.join(words)} failed:\n{done.stderr}")
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return json.loads(done.stdout), time.monotonic() - began, cpu


def measured(task: str, folder: Path) -> dict:
    """Train and evaluate one task."""
    run = str(folder / task)
    trained, seconds, cpu = called("train", "--preset", f"seq2seq-{task}", "--run", run)
    found, more_seconds, more_cpu = called("evaluate", run, "--translations")
    return {
        "task": task,
        "exact_match": found["exact_match"],
        "pairs": found["pairs"],
        "steps": trained["steps"],
        "seconds": round(seconds + more_seconds, 1),
        "cpu_seconds": round(cpu + more_cpu, 1),
    }


def main() -> None:
    """Measure the tasks, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = []
    print("task         exact match  held-out pairs   steps  seconds  CPU seconds")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QUIRE_CACHE"] = str(Path(folder) / "cache")
        for task in given.tasks:
            row = measured(task, Path(folder))
            rows.append(row)
            print(
                f"{task:12}{row['exact_match']:12.2%}{row['pairs']:16,}{row['steps']:8,}{row['seconds']:9.0f}"
                f"{row['cpu_seconds']:13.0f}",
                flush=True,
            )
    machine = {"processor": platform.processor() or platform.machine(), "cores": usable_cores()}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"machine": machine, "tasks": rows}, indent=2) + "\n")
    missed = [row["task"] for row in rows if row["exact_match"] < WANTED or row["seconds"] > 60 * MINUTES]
    print(f"Missed {WANTED:.0%} or {MINUTES:.0f} minutes: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
