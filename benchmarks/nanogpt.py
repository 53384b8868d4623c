"""nanoGPT as a peer: trained in a copy of its checkout on a text by characters, measured as Quire measures itself."""

import json
import pickle
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command import measured

from quire.data.prepare import HELD_OUT_CHARACTERS, HELD_OUT_SHARE

Settings = dict[str, Any]

CPU_RECIPE: Settings = {  # its README: "I only have a macbook"
    "device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 1, "block_size": 64, "batch_size": 12,
    "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0,
}  # fmt: skip
GPU_RECIPE: Settings = {"device": "cuda", "compile": True, "log_interval": 1}  # its configuration as it is, for a GPU
RECIPES = {"CPU recipe": CPU_RECIPE, "GPU recipe": GPU_RECIPE}
PATCHES = {  # of its train.py: each checkpoint has a name of its own; its seed and the clock of its log are given
    "'ckpt.pt'))": "f'ckpt-{iter_num}.pt'))",
    "manual_seed(1337": "manual_seed(int(os.environ['SEED'])",
    "time.time()": "getattr(time, os.environ['CLOCK'])()",
}
FOLDER, OUT = "data/shakespeare_char", "out-shakespeare-char"  # where its configuration looks, and writes


def cut(text: str) -> tuple[str, str]:
    """What one text is trained on, and what of it is held out, as Quire parts it: the last tenth, at most 256,000."""
    at = len(text) - int(min(len(text) * HELD_OUT_SHARE, HELD_OUT_CHARACTERS))
    return text[:at], text[at:]


@dataclass(frozen=True)
class Peer:
    """A copy of a checkout with a text in it, as its own data/shakespeare_char/prepare.py leaves one."""

    folder: Path
    held_out: str

    @classmethod
    def copied(cls, checkout: Path, folder: Path, text: str) -> "Peer":
        """The copy in `folder`, with PATCHES in its train.py."""
        shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git"))
        script = folder / "train.py"
        lines = script.read_text()
        for theirs, ours in PATCHES.items():
            assert theirs in lines, f"{script} has no {theirs}"
            lines = lines.replace(theirs, ours)
        script.write_text(lines)
        training, held_out = cut(text)
        letters = sorted(set(text))
        ids = {letter: number for number, letter in enumerate(letters)}
        for name, part in (("train", training), ("val", held_out)):
            np.array([ids[letter] for letter in part], dtype=np.uint16).tofile(folder / FOLDER / f"{name}.bin")
        meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": ids}
        (folder / FOLDER / "meta.pkl").write_bytes(pickle.dumps(meta))
        return cls(folder, held_out)

    def train(
        self, settings: Settings, core: int | None = None, seed: int = 1337, clock: str = "time"
    ) -> tuple[str, dict[str, float]]:
        """Train it; what it printed, and its wall and CPU seconds. Its log is by a `clock` of the module time."""
        for old in (self.folder / OUT).glob("*.pt"):
            old.unlink()
        flags = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags]
        return measured(command, self.folder, core, SEED=str(seed), CLOCK=clock)

    def loss(self) -> tuple[float, int]:
        """Nats per character over the whole held-out text of its last checkpoint, and that one's step; of an earlier
        one where that is better: it looks back until one is worse, which costs it none of its time.
        """
        steps = sorted(
            (int(path.stem.partition("-")[2]) for path in (self.folder / OUT).glob("ckpt-*.pt")), reverse=True
        )
        best = (float("inf"), 0)
        for step in steps:
            loss = self.loss_of(step)
            if loss >= best[0]:
                break
            best = loss, step
        return best

    def loss_of(self, step: int) -> float:
        """The whole-split loss of one checkpoint, by Quire's own measure; in a process of its own, on one thread."""
        output, _ = measured([sys.executable, str(Path(__file__).resolve()), str(self.folder), str(step)], self.folder)
        return float(json.loads(output.splitlines()[-1])["loss"])

    def bits_per_byte(self, loss: float) -> float:
        """Nats per character as bits per byte of what was predicted: all but the first character."""
        predicted = self.held_out[1:]
        return loss * len(predicted) / np.log(2) / len(predicted.encode())


def step_seconds(output: str) -> list[float]:
    """The seconds of each step that its log tells of; those with an evaluation or a checkpoint include it."""
    return [float(found) / 1000 for found in re.findall(r"^iter \d+: .*time ([\d.]+)ms", output, re.MULTILINE)]


def estimates(output: str, wall_seconds: float) -> list[tuple[float, float]]:
    """(seconds since its start, its own estimate of the held-out loss) of a run that logged every step."""
    steps = step_seconds(output)
    at, found, number = wall_seconds - sum(steps), [], 0  # the start: what its steps do not account for
    for line in output.splitlines():
        if line.startswith("iter "):
            at, number = at + steps[number], number + 1
        elif estimate := re.match(r"step \d+: .*val loss ([\d.]+)", line):
            found.append((round(at, 2), float(estimate[1])))
    return found


def evaluated(folder: Path, step: int) -> float:
    """Nats per character of the checkpoint of a step in a copy; sees nanoGPT's own model.py."""
    import torch

    from quire.evaluation.loss import total_loss
    from quire.layers.cross_entropy import IGNORED

    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]  # nanoGPT's

    saved = torch.load(folder / OUT / f"ckpt-{step}.pt", weights_only=True)
    arguments = saved["model_args"]

    class Model(torch.nn.Module):
        """nanoGPT's model behind Quire's model protocol."""

        def __init__(self) -> None:
            super().__init__()
            self.gpt = GPT(GPTConfig(**arguments))
            self.gpt.load_state_dict(saved["model"])

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.gpt(tokens, targets.masked_fill(targets == IGNORED, -1))[1]

    held_out = np.fromfile(folder / FOLDER / "val.bin", dtype=np.uint16)
    total, count = total_loss(Model(), held_out, arguments["block_size"], arguments["vocab_size"], torch.device("cpu"))
    return total / count


if __name__ == "__main__":
    print(json.dumps({"loss": evaluated(Path(sys.argv[1]), int(sys.argv[2]))}))  # the last line: its model prints too
