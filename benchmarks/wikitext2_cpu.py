"""WikiText-2's validation part as training text, its test part to measure: the four kinds of tokenizer, same minutes.

    python benchmarks/wikitext2_cpu.py [--minutes 3] [--train FILE] [--test FILE]

Each row is one command, `quire train FILE --tokenizer KIND ... --minutes M`, and `quire evaluate` of its best
checkpoint on the test text. Bits per byte compare across tokenizers; what a character model lacks is left out of its
text and of its bytes (some characters of a million). Prints a table and writes JSON.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from command import quire

SHARED = Path("../shared/data")
SIZES = {"byte-bpe": 4096, "character": 0, "word": 4096, "bpe": 4096}  # tokens; 0: all characters there are


def main() -> None:
    """Train and measure each kind, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, default=SHARED / "wikitext2_valid.txt")
    parser.add_argument("--test", type=Path, default=SHARED / "wikitext2_test.txt")
    parser.add_argument("--minutes", type=float, default=3.0, help="for each, from the command's start to its exit")
    parser.add_argument("--kinds", nargs="+", default=list(SIZES))
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further flags of quire train")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/wikitext2_cpu.json"))
    given = parser.parse_args()
    for path in (given.train, given.test):
        if not path.is_file():
            sys.exit(f"There is no {path}. Name the two texts with --train and --test.")
    rows = []
    for kind in given.kinds:
        rows.append(row(kind, given.train.resolve(), given.test.resolve(), given.minutes, given.options))
        print("{tokenizer:10} {vocabulary:6,} tokens  {steps:5,} steps  {held_out:.4f} held out"
              "  {bits_per_byte:.4f} bits per byte on the test text".format(**rows[-1]), flush=True)  # fmt: skip
    machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"machine": machine, "minutes": given.minutes, "runs": rows}, indent=1) + "\n")


def row(kind: str, train: Path, test: Path, minutes: float, options: list[str]) -> dict[str, Any]:
    """One kind: trained, and measured on the test text."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        size = ["--vocabulary-size", str(SIZES[kind])] if SIZES.get(kind) else []
        words = ["train", str(train), "--tokenizer", kind, *size, "--minutes", str(minutes), "--run", "run", *options]
        trained = quire([*words, "--json"], folder)
        seconds = time.perf_counter() - began
        measured = quire(["evaluate", "run", str(test), "--unknown", "skip", "--json"], folder)
        manifest = json.loads((Path(folder) / "run" / "manifest.json").read_text())
        return {
            "tokenizer": kind,
            "vocabulary": manifest["report"]["vocabulary"],
            "seconds": round(seconds, 1),
            "steps": trained["steps"],
            "tokens_trained_on": trained["tokens"],
            "held_out": trained["bits_per_byte"],
            "bits_per_byte": measured["bits_per_byte"],
            "test_tokens": measured["tokens"],
            "test_bytes": measured["bytes"],
        }


if __name__ == "__main__":
    main()
