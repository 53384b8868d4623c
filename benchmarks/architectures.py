"""Which architecture learns a text best: equal parameters, equal time, the same text, ranked by bits per byte.

    python benchmarks/architectures.py [--minutes 2] [--parameters 460000] [--text FILE] [--kinds NAME ...]

Each row is one command, `quire train FILE --preset NAME --model.embedding-size N ... --minutes M`: a preset with its
own recipe, its width chosen so that the parameters come nearest to the number wanted. Prints a table, writes JSON.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from command import quire

from quire.models import build_model
from quire.training.settings import layered, typed

PLAIN_GPT = {"positions": "learned", "normalization": "layernorm", "feedforward": "gelu-tanh", "bias": True,
             "qk_norm": False, "norm_epsilon": 1e-5, "feedforward_size": 0}  # fmt: skip
ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # name: a preset, and what is changed of it
    "RNN": ("rnn", {}),
    "LSTM": ("lstm", {}),
    "GRU": ("gru", {}),
    "GPT": ("default", {"kind": "gpt", **PLAIN_GPT}),
    "modern": ("default", {}),
    "sparse": ("sparse", {}),
}


def main() -> None:
    """Train each, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path("../shared/data/tinyshakespeare.txt"))
    parser.add_argument("--minutes", type=float, default=2.0, help="for each, from the command's start to its exit")
    parser.add_argument("--parameters", type=int, default=460_000)
    parser.add_argument("--kinds", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/architectures.json"))
    given = parser.parse_args()
    if not given.text.is_file():
        sys.exit(f"There is no {given.text}. Name a text with --text.")
    vocabulary = len(set(given.text.read_text(encoding="utf-8"))) + 2
    rows = [row(name, given, vocabulary) for name in given.kinds]
    rows.sort(key=lambda line: line["bits_per_byte"])
    print(f"\n{'':10}{'parameters':>11}{'width':>7}{'steps':>8}{'tokens/s':>10}{'bits per byte':>15}")
    for line in rows:
        print("{name:10}{parameters:11,}{width:7}{steps:8,}{tokens_per_second:10,}{bits_per_byte:15.4f}".format(**line))
    machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    about = {"machine": machine, "text": given.text.name, "minutes": given.minutes}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({**about, "runs": rows}, indent=1) + "\n")


def row(name: str, given: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """One architecture, trained."""
    preset, changes = ROWS[name]
    settings, parameters = fitted(name, vocabulary, given.parameters)
    flags = [word for key, value in {**changes, **settings}.items() for word in flag(key, value)]
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", str(given.text.resolve()), "--preset", preset, "--minutes", str(given.minutes)]
        began = time.perf_counter()
        trained = quire([*words, "--run", "run", *flags, "--json"], folder)
        seconds = time.perf_counter() - began
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    speeds = sorted(speed for line in lines if (speed := json.loads(line)["tokens_per_second"]))
    found = {
        "name": name,
        "command": " ".join(["quire", "train", given.text.name, "--preset", preset, *flags]),
        "parameters": parameters,
        "width": settings["embedding_size"],
        "steps": trained["steps"],
        "tokens": trained["tokens"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": round(seconds, 1),
        "validation_loss": trained["validation_loss"],
        "bits_per_byte": trained["bits_per_byte"],
    }
    print(f"{name}: {found['bits_per_byte']:.4f} bits per byte, {found['steps']:,} steps", flush=True)
    return found


def fitted(name: str, vocabulary: int, wanted: int) -> tuple[dict[str, Any], int]:
    """The width, and what goes with it, whose parameters come nearest to the number wanted."""
    preset, changes = ROWS[name]
    model = typed(layered(preset, flags={"model": changes})).with_model(vocabulary_size=vocabulary, separator=0).model
    heads = getattr(model, "heads", 0)
    step = 2 * heads or 2  # rotary positions turn pairs of a head's channels
    best: tuple[int, dict[str, Any], int] | None = None
    for width in range(8 * step, 512, step):
        sizes = {"embedding_size": width}
        if heads and model.feedforward_size:
            sizes["feedforward_size"] = round(width * model.feedforward_size / model.embedding_size / 8) * 8
        with torch.device("meta"):
            built = build_model(replace(model, **sizes))
        parameters = sum(parameter.numel() for parameter in built.parameters())
        if best is None or abs(parameters - wanted) < best[0]:
            best = (abs(parameters - wanted), sizes, parameters)
    assert best is not None
    return best[1], best[2]


def flag(name: str, value: Any) -> list[str]:
    """A setting of the model as words of a command line."""
    return [f"--model.{name.replace('_', '-')}", str(value)]


if __name__ == "__main__":
    main()
