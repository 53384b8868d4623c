"""Tiny-shakespeare on two CPU cores, by characters: Quire's default preset beside nanoGPT's CPU recipe.

    python benchmarks/shakespeare_cpu.py --text ../shared/data/tinyshakespeare.txt --nanogpt CHECKOUT [--minutes 2]

Both losses are the same measure: nats per character over the whole held-out last 10%, each character predicted once, in
windows of the model's own context length. nanoGPT runs as its README says for a CPU, in a copy of the checkout.
Prints a table and writes JSON; without --nanogpt, Quire alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from command import machine, measured
from nanogpt import CPU_RECIPE, Peer, estimates


def main() -> None:
    """Run what was asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path("../shared/data/tinyshakespeare.txt"))
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--minutes", type=float, default=2.0, help="for Quire, from start to exit")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, with seeds 1, 2, 3 ... for Quire")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/shakespeare_cpu.json"))
    given = parser.parse_args()
    rows = []
    for seed in range(1, given.repeats + 1):
        if given.nanogpt:
            rows.append(nanogpt(given.nanogpt.resolve(), given.text.resolve()))
            show(rows[-1])
        rows.append(quire(given.text.resolve(), given.minutes, seed))
        show(rows[-1])
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"machine": machine(), "runs": rows}, indent=1) + "\n")
    print("\nmedians:")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        keys = ("loss", "wall_seconds", "cpu_seconds")
        show({"name": name, **{key: statistics.median(row[key] for row in mine) for key in keys}})


def quire(text: Path, minutes: float, seed: int) -> dict[str, Any]:
    """`quire train TEXT --minutes M` with the default preset."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "quire", "train", str(text), "--minutes", str(minutes), "--seed", str(seed)]
        output, used = measured([*command, "--run", f"{folder}/run", "--json"], Path(folder))
        result = json.loads(output)
        return {
            "name": f"Quire default, {minutes:g} minutes",
            "loss": result["validation_loss"],
            **used,
            **result,
            "run": "",
        }


def nanogpt(checkout: Path, text: Path) -> dict[str, Any]:
    """nanoGPT's CPU recipe in a copy of its checkout; the whole-split loss of the best checkpoint it kept."""
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer.copied(checkout, Path(folder, "nanogpt"), text.read_text("utf-8"))
        output, used = peer.train(CPU_RECIPE)
        loss, _ = peer.loss()
    own = estimates(output, used["wall_seconds"])[-1][1]
    return {"name": "nanoGPT, its CPU recipe", "loss": loss, **used, "its_own_estimate": own}


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['name']:28} loss {row['loss']:.4f}   {row['wall_seconds']:6.1f} s wall {row['cpu_seconds']:7.1f} s CPU",
        flush=True,
    )


if __name__ == "__main__":
    main()
