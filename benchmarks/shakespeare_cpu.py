"""Tiny-shakespeare on two CPU cores, by characters: Quire's default preset beside nanoGPT's CPU recipe.

    python benchmarks/shakespeare_cpu.py --text ../shared/data/tinyshakespeare.txt --nanogpt CHECKOUT [--minutes 2]

Both losses are the same measure: nats per character over the whole held-out last 10%, each character predicted once, in
windows of the model's own context length. nanoGPT runs as its README says for a CPU, in a copy of the checkout.
Prints a table and writes JSON; without --nanogpt, Quire alone.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

NANOGPT_RECIPE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
    " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


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
    """nanoGPT's CPU recipe in a copy of its checkout; the loss of the checkpoint it kept, over the whole split."""
    with tempfile.TemporaryDirectory() as folder:
        copy, stubs = Path(folder) / "nanoGPT", Path(folder) / "stubs"
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
        stubs.mkdir()
        (stubs / "requests.py").write_text("")  # its preparation imports it for a download that is not needed here
        shutil.copy(text, copy / "data/shakespeare_char/input.txt")
        subprocess.run(
            [sys.executable, "data/shakespeare_char/prepare.py"],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(stubs)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT_RECIPE.split()]
        output, used = measured(command, copy)
        estimates = [line for line in output.splitlines() if "val loss" in line]
        return {
            "name": "nanoGPT, its CPU recipe",
            "loss": nanogpt_loss(copy),
            **used,
            "its_own_estimate": float(estimates[-1].split()[-1]),
        }


def nanogpt_loss(copy: Path) -> float:
    """The whole-split loss of nanoGPT's checkpoint, by Quire's own measure."""
    import torch

    from quire.evaluation.loss import total_loss
    from quire.layers.cross_entropy import IGNORED

    sys.path.insert(0, str(copy))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]  # nanoGPT's

    saved = torch.load(copy / "out-shakespeare-char/ckpt.pt", weights_only=True)

    class Model(torch.nn.Module):
        """nanoGPT's model behind Quire's model protocol."""

        def __init__(self) -> None:
            super().__init__()
            self.gpt = GPT(GPTConfig(**saved["model_args"]))
            self.gpt.load_state_dict(saved["model"])

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.gpt(tokens, targets.masked_fill(targets == IGNORED, -1))[1]

    held_out = np.fromfile(copy / "data/shakespeare_char/val.bin", dtype=np.uint16)
    arguments = saved["model_args"]
    total, count = total_loss(Model(), held_out, arguments["block_size"], arguments["vocab_size"], torch.device("cpu"))
    return total / count


def measured(command: list[str], folder: Path) -> tuple[str, dict[str, float]]:
    """Run a command in a folder; its standard output, and the wall and CPU seconds of the whole process."""
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return output, {"wall_seconds": round(time.time() - began, 1), "cpu_seconds": round(cpu, 1)}


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch

    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['name']:28} loss {row['loss']:.4f}   {row['wall_seconds']:6.1f} s wall {row['cpu_seconds']:7.1f} s CPU",
        flush=True,
    )


if __name__ == "__main__":
    main()
