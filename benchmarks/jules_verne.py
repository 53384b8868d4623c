"""Jules Verne by characters: the losses that the hand-written engine and the default one reach in the same minutes.

    python benchmarks/jules_verne.py [--minutes 10] [--engines autograd manual] [--presets default lstm] [--together]
        [--picture FILE] [-- further flags of quire train, for every run]

The published figure beside it is that of eduardoleao052/Transformer-from-scratch: 1.01 nats per character on texts of
the same author, after 100,000 steps in 10 h 40 min on a GTX 1070. It does not say whether of text that was trained on;
training and held-out loss are therefore both shown. Each run is one command, `quire train FILE --preset NAME --engine
NAME --minutes M`. Prints a table and writes JSON.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command import quire

PUBLISHED = {"name": "Transformer-from-scratch, as published", "loss": 1.01, "steps": 100_000, "minutes": 640}
POINTS = 60  # of each curve: as many equal stretches of time


def main() -> None:
    """Train with every preset and engine, print the table, write the JSON."""
    words, flags = sys.argv[1:], []
    if "--" in words:
        words, flags = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path("../shared/data/jules_verne_4M.txt"))
    parser.add_argument("--minutes", type=float, default=10.0, help="for each, from the command's start to its exit")
    parser.add_argument("--engines", nargs="+", default=["autograd", "manual"])
    parser.add_argument("--presets", nargs="+", default=["default"])
    parser.add_argument("--together", action="store_true", help="the engines at the same time; give each --threads")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/jules_verne.json"))
    parser.add_argument("--picture", type=Path, help="a PNG of both losses over minutes")
    given = parser.parse_args(words)
    if not given.text.is_file():
        sys.exit(f"There is no {given.text}. Name the text with --text.")
    print(f"{'':20}{'parameters':>11}{'steps':>8}{'seconds':>9}{'training':>10}{'held out':>10}{'bits per byte':>15}")
    runs = []
    for preset in given.presets:
        train = partial(row, given.text.resolve(), preset, minutes=given.minutes, flags=flags)
        with ThreadPoolExecutor(len(given.engines) if given.together else 1) as pool:
            for run in pool.map(train, given.engines):
                runs.append(run)
                print("{name:20}{parameters:11,}{steps:8,}{seconds:9.0f}{train_loss:10.4f}{validation_loss:10.4f}"
                      "{bits_per_byte:15.4f}".format(**run), flush=True)  # fmt: skip
    print("{name}: {loss} after {steps:,} steps and {minutes} minutes, on a GTX 1070".format(**PUBLISHED))
    machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    about = {"machine": machine, "text": given.text.name, "minutes": given.minutes, "published": PUBLISHED}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    runs_as_lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)
    given.json.write_text(f'{json.dumps(about, indent=1)[:-2]},\n "runs": [\n{runs_as_lines}\n ]\n}}\n')
    if given.picture:
        draw(runs, given.picture)


def row(text: Path, preset: str, engine: str, minutes: float, flags: list[str]) -> dict[str, Any]:
    """One run: what it came to, and its curve."""
    words = ["--preset", preset, "--engine", engine, "--minutes", f"{minutes:g}", "--tokenizer", "character", *flags]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trained = quire(["train", str(text), *words, "--run", "run", "--json"], folder)
        seconds = time.perf_counter() - began
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        manifest = json.loads((Path(folder) / "run" / "manifest.json").read_text())
        size = quire(["look", "run", "--json"], folder)["parameters"]
    points = curve(lines)
    speeds = sorted(speed for line in lines if (speed := line["tokens_per_second"]))
    return {
        "name": f"{preset}, {engine}",
        "command": " ".join(["quire", "train", text.name, *words]),
        "device": f"{manifest['device']}, threads: {manifest['threads']}",
        "parameters": size,
        "steps": trained["steps"],
        "tokens": trained["tokens"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": round(seconds, 1),
        "train_loss": points[-1]["train_loss"],
        "validation_loss": trained["validation_loss"],
        "bits_per_byte": trained["bits_per_byte"],
        "curve": points,
    }


def curve(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """metrics.jsonl in at most POINTS points: the mean training loss of each stretch of time, and what was measured
    of the held-out text in it, if anything was."""
    points, last = [], lines[-1]["seconds"]
    stretches: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        stretches.setdefault(min(int(line["seconds"] / last * POINTS), POINTS - 1), []).append(line)
    for stretch in stretches.values():
        point = {"seconds": round(stretch[-1]["seconds"], 1), "step": stretch[-1]["step"]}
        losses = [line["train_loss"] for line in stretch if line["train_loss"] is not None]
        if losses:
            point["train_loss"] = round(sum(losses) / len(losses), 4)
        for line in stretch:
            if line.get("validation_loss") is not None:
                point["validation_loss"] = round(line["validation_loss"], 4)
                point["bits_per_byte"] = round(line["validation_bits_per_byte"], 4)
        points.append(point)
    return points


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Both losses of each run over minutes, and the published figure as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        for key, style in (("train_loss", {"alpha": 0.5}), ("validation_loss", {"marker": "o", "markersize": 3})):
            points = [(point["seconds"] / 60, point[key]) for point in run["curve"] if key in point]
            what = "training" if key == "train_loss" else "held out"
            label = f"{run['name']}: {what}, {points[-1][1]:.3f} at the end"
            axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, **style)
    axes.axhline(PUBLISHED["loss"], color="black", linestyle="--", linewidth=1)
    text = f"{PUBLISHED['name']}: {PUBLISHED['loss']} after {PUBLISHED['minutes']} minutes on a GTX 1070"
    axes.annotate(text, (0.02, PUBLISHED["loss"]), (0, 4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    held_out = [point["validation_loss"] for run in runs for point in run["curve"] if "validation_loss" in point]
    axes.set_ylim(0.9, max(1.2, min(3.0, max(held_out))))
    axes.set_xlabel("minutes")
    axes.set_ylabel("loss (nats per character)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
