"""Whole runs on one text, of Quire and its peers, each made once and kept in a JSON file: claims share them."""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from baselines import BASELINES
from command import machine, measured
from nanogpt import RECIPES, Peer, cut, estimates

Run = dict[str, Any]  # "loss" in nats per character of the whole held-out text, "wall_seconds", "cpu_seconds", "curve"


class Runs:
    """The runs so far; a run that is not there is made, with all cores and threads as they are by default.

    Loss is bits per byte brought to nats per character, so that it is one measure whatever the tokenizer.
    """

    def __init__(self, path: Path, text: Path, checkout: Path | None = None, device: str = "cpu") -> None:
        self.path, self.text, self.checkout, self.device = path, text.resolve(), checkout, device
        self.kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.kept.setdefault("runs", {})

    def save(self) -> None:
        """Write what there is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.kept, "machine": machine(self.device)}, indent=1) + "\n")

    def keep(self, name: str, run: Run) -> Run:
        """Add a run, say it and save."""
        self.kept["runs"][name] = run
        self.save()
        about = ", ".join(f"{key} {run[key]:,.4g}" for key in ("wall_seconds", "cpu_seconds", "steps") if key in run)
        print(f"  {name}: loss {run['loss']:.4f} {about}", file=sys.stderr, flush=True)
        return run

    def quire(self, flags: list[str], minutes: float, seed: int = 1) -> Run:
        """`quire train TEXT --minutes M FLAGS`, nothing in its cache."""
        name = f"{self.called(flags)}{minutes:g} --seed {seed}"
        if name in self.kept["runs"]:
            return self.kept["runs"][name]
        with tempfile.TemporaryDirectory() as folder:
            words = ["train", str(self.text), "--minutes", f"{minutes:g}", "--seed", str(seed), *flags]
            command = [sys.executable, "-m", "quire", *words, "--run", f"{folder}/run", "--json"]
            output, used = measured(command, folder, QUIRE_CACHE=f"{folder}/cache")
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        result, held_out = json.loads(output), cut(self.text.read_text("utf-8"))[1]
        nats = math.log(2) * len(held_out.encode()) / len(held_out)  # per character, of a bit per byte
        curve = [
            (row["seconds"], round(row["validation_bits_per_byte"] * nats, 5))
            for row in map(json.loads, lines) if row.get("validation_bits_per_byte") is not None
        ]  # fmt: skip
        loss = round(result["bits_per_byte"] * nats, 5)
        return self.keep(name, {"loss": loss, **used, "steps": result["steps"], "minutes": minutes, "curve": curve})

    @staticmethod
    def called(flags: list[str]) -> str:
        """How the names of Quire's runs with these flags begin."""
        return " ".join(["quire train", *flags, "--minutes "])

    def all_of(self, flags: list[str]) -> list[Run]:
        """Quire's runs with these flags, of any minutes and seed."""
        return [run for name, run in self.kept["runs"].items() if name.startswith(self.called(flags))]

    def nanogpt(self, seed: int = 1337, recipe: str = "CPU recipe") -> Run | None:
        """One of nanoGPT's RECIPES as it is; None without a checkout. Its curve is its own estimates."""
        name = f"nanoGPT, {recipe}, seed {seed}"
        if name in self.kept["runs"]:
            return self.kept["runs"][name]
        if self.checkout is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            peer = Peer.copied(self.checkout, Path(folder, "nanogpt"), self.text.read_text("utf-8"))
            output, used = peer.train(RECIPES[recipe], seed=seed)
            loss, steps = peer.loss()
        curve = estimates(output, used["wall_seconds"])
        return self.keep(name, {"loss": round(loss, 5), **used, "steps": steps, "curve": curve})

    def baseline(self, name: str) -> Run:
        """One of BASELINES."""
        if name in self.kept["runs"]:
            return self.kept["runs"][name]
        return self.keep(name, {"loss": round(BASELINES[name](self.text.read_text("utf-8")), 5)})
