"""The sweep that the planner's recipes and predictions are fitted to: texts, sizes of text, times and recipes.

    python benchmarks/sweep.py [--minutes 0.25 1] [--families modern ngram] [--sizes BYTES ...] [--workers 2]
    python benchmarks/sweep.py --fit      writes quire/planning/recipes.json
    python benchmarks/sweep.py --plot     draws docs/sweep.png

A cell is one recipe trained on one text, cut to a size, for so many core-minutes: seconds of training steps on one
core, so that evaluations and other programs beside it do not count. It begins by measuring the CPU seconds of a step,
and from that takes the number of steps. Each cell is a line of benchmarks/results/sweep.jsonl, and one that is there is
not done again: stop it and call it again at will. The cheapest and most telling cells come first.

None of the six texts of benchmarks/plan_honesty.py is among those fitted to.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from command import ROOT

from quire.planning.recipes import TABLE, features, table

RESULTS = ROOT / "benchmarks" / "results" / "sweep.jsonl"
SHARED = ROOT.parent / "shared" / "data"
TEXTS = {  # where each comes from: a file in ../shared/data, a corpus of Quire's, or code
    "tiny-shakespeare": "tinyshakespeare.txt",
    "king-james": "king-james",
    "shakespeare": "shakespeare",
    "wikitext2": "wikitext2_test.txt",
    "code": "packages",
    "enwik8-later": "enwik8",
}
TEXTS_OF = {  # the texts of a size; the second one has few recipes, and none of the long cells
    20_000: ["tiny-shakespeare", "code"],
    200_000: ["king-james", "code"],
    1_000_000: ["tiny-shakespeare", "wikitext2"],
    5_000_000: ["shakespeare", "enwik8-later"],
    80_000_000: ["enwik8-later"],
}
# Of each time the recipes that may be the best, neither far too large for it nor far too small; the first of each
# family, in the first two places, is that of the second texts. For texts of up to 200 KB, and for larger ones:
SMALL = {
    0.25: ["modern-1x64-64-pieces", "counts-1x64-64-pieces", "modern-1x64-64", "counts-1x64-64", "ngram-1x64-64"],
    1.0: [
        "modern-2x96-128-pieces-dropout0.1", "counts-2x96-128-pieces", "modern-1x64-64-pieces",
        "modern-2x96-128-dropout0.3", "counts-2x96-128", "counts-2x96-128-dropout0.3", "ngram-2x96-128",
    ],
    3.0: [
        "modern-2x96-128-pieces-dropout0.3", "counts-2x96-128-pieces", "modern-2x96-128-pieces-dropout0.5",
        "counts-2x96-128",
    ],
    10.0: ["modern-2x96-128-pieces-dropout0.5", "counts-2x96-128-pieces", "modern-2x96-128-pieces-dropout0.3"],
    30.0: ["modern-2x96-128-pieces-dropout0.5", "counts-2x96-128-pieces"],
}  # fmt: skip
LARGE = {
    0.25: ["modern-1x64-64-pieces", "counts-1x64-64-pieces", "modern-1x64-64", "modern-2x96-128", "ngram-1x64-64"],
    1.0: [
        "modern-2x96-128-pieces", "counts-2x96-128-pieces", "modern-2x96-128-pieces2048", "modern-2x96-128",
        "ngram-2x96-128-pieces", "ngram-2x96-128",
    ],
    3.0: [
        "modern-3x128-128-pieces", "counts-3x128-128-pieces", "modern-3x128-128-pieces2048", "modern-3x96-128-pieces",
        "ngram-3x128-128-pieces",
    ],
    10.0: [
        "modern-4x128-256-pieces", "counts-4x128-256-pieces", "modern-3x128-128-pieces", "counts-3x128-128-pieces",
    ],
    30.0: ["modern-4x128-256-pieces", "counts-4x128-256-pieces"],
}  # fmt: skip
MINUTES, SIZES = [*LARGE], [*TEXTS_OF]
PART_OF = {"tiny-shakespeare": "shakespeare"}  # of another text: both are left out of a fit together
LATER = 20_000_000  # enwik8 is taken from here on: its first megabytes are one of the six texts
MOST = 10  # evaluations, as in a training by the clock; of a longer text, which costs longer, fewer, by core-minutes
EVALUATIONS = {0.25: 2, 1.0: 3, 3.0: 6, 10.0: 8, 30.0: 10}
CLEARLY = 0.01  # lower bits per byte, as a share: more than chance makes of the same recipe
PENALTY = 0.003  # of the regression's coefficients, which keeps them small where cells are few


def cells(minutes: list[float], families: list[str], sizes: list[int]) -> Iterator[dict[str, Any]]:
    """What to train, the cheapest and most telling first."""
    kinds = {name: recipe["model"]["kind"] for name, recipe in table()["recipes"].items()}
    for budget in sorted(minutes):
        for rank, size, text in places(budget):
            for name in contenders(budget, size, rank):
                if kinds[name] in families and size in sizes:
                    yield {"text": text, "bytes": size, "minutes": budget, "recipe": name}


def places(budget: float) -> list[tuple[int, int, str]]:
    """The sizes of a time, each with its first text (rank 0), in short cells with a second one too (rank 1)."""
    sizes = [size for size in SIZES if size < max(SIZES) or budget > min(MINUTES)]  # reading the longest takes as long
    ranks = 2 if budget <= 3 else 1
    return [(rank, size, TEXTS_OF[size][rank]) for rank in range(ranks) for size in sizes if rank < len(TEXTS_OF[size])]


def contenders(budget: float, size: int, rank: int) -> list[str]:
    """The recipes that may be the best of a time and size; of a second text or a very long one, of each family one."""
    names = SMALL[budget] if size <= 200_000 else LARGE[budget]
    return names if rank == 0 and size < max(SIZES) else names[:2]


def train(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one cell in a process of its own, with one thread; its line."""
    text = folder / f"{cell['text']}-{cell['bytes']}.txt"
    words = [sys.executable, str(Path(__file__)), "--cell", json.dumps({**cell, "file": str(text)})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {**cell, "failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return {**cell, **json.loads(done.stdout.splitlines()[-1])}


def trained(cell: dict[str, Any]) -> dict[str, Any]:
    """One cell, in this process: measured, trained, and the text counted."""
    import torch

    import quire
    from quire.planning.machine import measured
    from quire.planning.measure import measure
    from quire.training.settings import Settings, layered, typed
    from quire.training.texts import load_data
    from quire.training.train import fitted

    recipe, path = table()["recipes"][cell["recipe"]], cell["file"]
    flags = {**recipe, "data": {"text": [path]}, "training": {**recipe["training"], "threads": 1}}
    torch.set_num_threads(1)
    settings: Settings = typed(layered("default", None, {**flags, "training": {**flags["training"], "steps": 1}}))
    settings, prepared = fitted(*load_data(settings)[:2])
    text = measure(prepared, piloted=True)
    seconds = 60 * cell["minutes"]
    speed = measured(settings, prepared, torch.device("cpu"), min(5.0, 0.2 * seconds), 1)
    assert speed.cpu_seconds is not None
    steps = max(20, round(seconds / speed.cpu_seconds))
    count = MOST if cell["bytes"] <= 200_000 else EVALUATIONS[cell["minutes"]]
    training = {**flags["training"], "steps": steps, "evaluation_interval": -(-steps // count), "sample_tokens": 0}
    with tempfile.TemporaryDirectory() as folder:
        run = quire.train(path, run=Path(folder) / "run", model=recipe["model"], device="cpu", **training)
        lines = [line for line in run.metrics() if line.get("validation_loss") is not None]
    best = min(lines, key=lambda line: line["validation_loss"])
    return {
        "training_bytes": text.bytes,
        "steps": steps,
        "step_seconds": round(speed.cpu_seconds, 5),
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
        "bits_per_byte": round(best["validation_bits_per_byte"], 4),
        "best_step": best["step"],
        "last_bits_per_byte": round(lines[-1]["validation_bits_per_byte"], 4),
        "vocabulary": prepared.tokenizer.vocabulary_size,
        "counted": [round(bits, 4) for bits in text.counted],
        "pilot": round(text.pilot, 4),
    }


def write_text(name: str, size: int, folder: Path) -> None:
    """One of the texts, cut to a size in bytes, as a file."""
    path = folder / f"{name}-{size}.txt"
    if path.exists():
        return
    source = TEXTS[name]
    if source == "packages":
        data = installed_code(size)
    elif source.endswith(".txt"):
        data = (SHARED / source).read_bytes()
    else:
        from quire.data.corpora import CORPORA
        from quire.sources import fetch

        data = b"\n".join(piece for _, piece in fetch(CORPORA[source]))
    start = LATER if name == "enwik8-later" else 0
    path.write_text(data[start : start + size].decode("utf-8", "ignore"), encoding="utf-8", newline="\n")


def installed_code(size: int) -> bytes:
    """Python code of installed packages (torch and what it needs), in the order of their names."""
    import torch

    parts, total = [], 0
    for path in sorted(Path(torch.__file__).parents[1].glob("[a-z]*/**/*.py")):
        parts.append(path.read_bytes())
        total += len(parts[-1])
        if total > size:
            break
    return b"\n".join(parts)


def campaign(given: argparse.Namespace) -> None:
    """Train the cells that have no line yet."""
    done = {key(line) for line in read()}
    waiting = [cell for cell in cells(given.minutes, given.families, given.sizes) if key(cell) not in done]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.workers) as pool:
        while waiting:
            batch, waiting = waiting[: given.workers], waiting[given.workers :]
            for cell in batch:
                write_text(cell["text"], cell["bytes"], Path(folder))
            for line in pool.map(lambda cell: train(cell, Path(folder)), batch):
                shown = line.get("bits_per_byte", line.get("failed"))
                print(
                    f"{line['minutes']:6} {line['bytes']:11,} {line['text']:18}{line['recipe']:28}{shown}", flush=True
                )
                if "failed" not in line:
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")


def read() -> list[dict[str, Any]]:
    """The lines there are."""
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a cell the same one."""
    return cell["text"], cell["bytes"], cell["minutes"], cell["recipe"]


def fit() -> None:
    """Write choices, steps' seconds and coefficients into the planner's table."""
    lines, found = read(), {"recipes": table()["recipes"]}
    family = {name: recipe["model"]["kind"] for name, recipe in found["recipes"].items()}
    lines = [line for line in lines if line["recipe"] in family]
    found["step_seconds"] = {
        name: round(float(np.median(own)), 5)
        for name in family
        if (own := [line["step_seconds"] for line in lines if line["recipe"] == name])
    }
    found["choices"], found["predictions"] = [], {}
    for kind in dict.fromkeys(family.values()):
        own = [line for line in lines if family[line["recipe"]] == kind]
        for minutes, size in sorted({(line["minutes"], line["bytes"]) for line in own}):
            spent, recipe = winner([line for line in own if line["bytes"] == size and line["minutes"] <= minutes])
            place = {"family": kind, "core_seconds": 60 * minutes, "bytes": size, "recipe": recipe}
            found["choices"].append(place | ({"share": round(spent / minutes, 4)} if spent < minutes else {}))
        if own:
            found["predictions"][kind] = regression(kind, unspoilt(best_of(own)), found["step_seconds"])
    TABLE.write_text(spelled(found), encoding="utf-8")


def winner(group: list[dict[str, Any]]) -> tuple[float, str]:
    """Of a size's cells up to some minutes the best minutes and recipe: the most minutes, unless fewer did clearly
    better on the texts that have both."""
    best: tuple[float, str] | None = None
    for minutes in sorted({line["minutes"] for line in group}, reverse=True):
        other = minutes, best_recipe([line for line in group if line["minutes"] == minutes])
        if best is None or gain(group, best, other) > CLEARLY:
            best = other
    assert best is not None, "there are cells"
    return best


def gain(group: list[dict[str, Any]], one: tuple[float, str], other: tuple[float, str]) -> float:
    """By how much, as a mean logarithm, the other minutes and recipe come to fewer bits per byte; 0 without a text."""
    bits = {(line["minutes"], line["recipe"], line["text"]): line["bits_per_byte"] for line in group}
    both = [text for *of, text in bits if tuple(of) == one and (*other, text) in bits]
    return float(np.mean([np.log(bits[*one, text] / bits[*other, text]) for text in both])) if both else 0.0


def best_recipe(group: list[dict[str, Any]]) -> str:
    """The best recipe of a time and size: ln(bits per byte) is taken as a text's share plus a recipe's, by least
    squares, since not every text has every recipe."""
    names, texts = (list(dict.fromkeys(line[what] for line in group)) for what in ("recipe", "text"))
    rows = np.zeros((len(group), len(names) + len(texts)))
    for row, line in zip(rows, group, strict=True):
        row[names.index(line["recipe"])] = row[len(names) + texts.index(line["text"])] = 1
    shares = np.linalg.lstsq(rows, np.log([line["bits_per_byte"] for line in group]))[0]
    return names[int(np.argmin(shares[: len(names)]))]


def unspoilt(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that a shorter time did clearly better than: the planner takes the shorter time there."""

    def spoilt(line: dict[str, Any]) -> bool:
        shorter = [other for other in lines if key(other)[:2] == key(line)[:2] and other["minutes"] < line["minutes"]]
        return any(other["bits_per_byte"] < line["bits_per_byte"] * (1 - CLEARLY) for other in shorter)

    return [line for line in lines if not spoilt(line)]


def best_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each text, size and time the best line: what the planner's choice should come to."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        place = key(line)[:3]
        if place not in found or line["bits_per_byte"] < found[place]["bits_per_byte"]:
            found[place] = line
    return list(found.values())


def regression(kind: str, lines: list[dict[str, Any]], step_seconds: dict[str, float]) -> dict[str, Any]:
    """Ridge regression of ln(bits per byte / the best counted ones); the deviation is that of texts left out.

    Core-seconds are steps times what a step of the recipe typically took: what a busy machine added is left out.
    """
    times = [line["steps"] * step_seconds[line["recipe"]] for line in lines]
    sizes = [line["training_bytes"] for line in lines]
    rows = zip(times, sizes, lines, strict=True)
    inputs = np.array([features(kind, time, size, line["counted"], line["pilot"]) for time, size, line in rows])
    targets = np.array([np.log(line["bits_per_byte"] / min(line["counted"])) for line in lines])
    texts = np.array([PART_OF.get(line["text"], line["text"]) for line in lines])
    errors = []
    for text in dict.fromkeys(texts):
        if (texts != text).any():
            errors += list(inputs[texts == text] @ ridge(inputs[texts != text], targets[texts != text]))
            errors[-(texts == text).sum() :] -= targets[texts == text]
    return {
        "coefficients": [round(float(value), 6) for value in ridge(inputs, targets)],
        "deviation": round(float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.1, 4),
        "core_seconds": [round(min(times), 1), round(max(times), 1)],
        "bytes": [min(sizes), max(sizes)],
        "cells": len(lines),
    }


def ridge(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Least squares with a penalty on all coefficients but the first, of inputs brought to one scale."""
    middle, scale = inputs[:, 1:].mean(0), inputs[:, 1:].std(0) + 1e-9
    z = np.column_stack([np.ones(len(inputs)), (inputs[:, 1:] - middle) / scale])
    penalty = PENALTY * len(inputs) * np.diag([0.0] + [1.0] * (z.shape[1] - 1))
    solved = np.linalg.solve(z.T @ z + penalty, z.T @ targets)
    slopes = solved[1:] / scale
    return np.concatenate([[solved[0] - slopes @ middle], slopes])


def spelled(found: dict[str, Any]) -> str:
    """JSON with a line for each recipe and choice."""
    rows = []
    for name, value in found.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        else:
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
            text = f"{{\n{lines}\n }}"
        rows.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(rows) + "\n}\n"


def plot(path: Path) -> None:
    """Bits per byte over core-minutes, a panel for each size of text: the best of each family and text."""
    from matplotlib.figure import Figure

    lines = read()
    family = {name: recipe["model"]["kind"] for name, recipe in table()["recipes"].items()}
    sizes = sorted({line["bytes"] for line in lines})
    figure = Figure(figsize=(4 * len(sizes), 4), dpi=100, layout="constrained")
    for axes, size in zip(np.atleast_1d(figure.subplots(1, len(sizes))), sizes, strict=True):
        own = [line for line in lines if line["bytes"] == size]
        for number, text in enumerate(sorted({line["text"] for line in own})):
            for kind, style in (("modern", "o-"), ("ngram", "s--")):
                same = [line for line in own if line["text"] == text and family[line["recipe"]] == kind]
                best = sorted(best_of(same), key=lambda line: line["minutes"])
                points = [(line["minutes"], line["bits_per_byte"]) for line in best]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=f"{text}, {kind}")
            counted = min(next(line for line in own if line["text"] == text)["counted"])
            axes.axhline(counted, color=f"C{number}", linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(MINUTES[0] / 1.3, MINUTES[-1] * 1.3)
        axes.set_xticks(MINUTES, [f"{minutes:g}" for minutes in MINUTES])
        axes.minorticks_off()
        axes.set_title(f"{size:,} bytes")
        axes.set_xlabel("core-minutes of training")
        axes.set_ylabel("held-out bits per byte (dotted: counted)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path)


def main() -> None:
    """Run the campaign, or fit, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=MINUTES, choices=MINUTES)
    parser.add_argument("--families", nargs="+", default=["modern", "ngram"])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, choices=SIZES, help="of the texts, in bytes")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--fit", action="store_true", help="write the planner's table from the lines there are")
    parser.add_argument("--plot", action="store_true", help="draw docs/sweep.png from the lines there are")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # one cell as JSON, in a process of its own
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(trained(json.loads(given.cell))))
    elif given.fit or given.plot:
        fit() if given.fit else None
        plot(ROOT / "docs" / "sweep.png") if given.plot else None
    else:
        began = time.perf_counter()
        campaign(given)
        print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
