"""From Shakespeare to ten kilobytes of Wikipedia: fine-tuning, measured on more of the new text before and after.

    python benchmarks/finetune_cpu.py [--minutes 2] [--steps 150]

A model of tiny-shakespeare; the same fine-tuned on the first 10,240 bytes of the articles, whose new characters become
tokens; and a model of those bytes alone, trained for as many steps. All are measured on the next 200,000 bytes, which
none of them has seen. The base lacks some characters of it, and leaves them out. Prints a table and writes JSON.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch
from command import quire

SHARED = Path("../shared/data")
SMALL, MEASURED = 10_240, 200_000  # bytes


def main() -> None:
    """Train, fine-tune, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=SHARED / "tinyshakespeare.txt")
    parser.add_argument("--other", type=Path, default=SHARED / "wikitext2_valid.txt")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training of the base")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning, and of the model from nothing")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/finetune_cpu.json"))
    given = parser.parse_args()
    for path in (given.base, given.other):
        if not path.is_file():
            sys.exit(f"There is no {path}. Name the two texts with --base and --other.")
    text = given.other.read_bytes()
    steps = ["--steps", str(given.steps), "--json"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small.txt").write_text(text[:SMALL].decode("utf-8", "ignore"), encoding="utf-8")
        (folder / "more.txt").write_text(text[SMALL : SMALL + MEASURED].decode("utf-8", "ignore"), encoding="utf-8")
        quire(["train", str(given.base.resolve()), "--run", "base", "--minutes", str(given.minutes), "--json"], folder)
        tuned = quire(["finetune", "base", "small.txt", "--run", "tuned", "--unknown", "grow", *steps], folder)
        quire(["train", "small.txt", "--run", "alone", *steps], folder)
        rows = {run: quire(["evaluate", run, "more.txt", "--unknown", "skip", "--json"], folder)
                for run in ("base", "tuned", "alone")}  # fmt: skip
    print(f"held-out kilobyte of the small text: {tuned['before']['bits_per_byte']:.4f} bits per byte before,"
          f" {tuned['bits_per_byte']:.4f} after {given.steps} steps")  # fmt: skip
    for run, row in rows.items():
        left = f", {row['unknown']} characters left out" if "unknown" in row else ""
        print(f"{run:6} {row['bits_per_byte']:.4f} bits per byte on {row['bytes']:,} bytes more{left}")
    machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "minutes": given.minutes, "steps": given.steps, "held_out": tuned, "more": rows}
    given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
