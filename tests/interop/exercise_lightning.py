"""Trainings by Lightning's Trainer: `python exercise_lightning.py FOLDER PROCESSES` does `main` on so many processes.

FOLDER has text.txt. Each training leaves the folder NAME there, with its logs, and its last checkpoint as NAME.ckpt.
"""

import csv
import os
import random
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from quire.interop.lightning import LanguageModel, TextData, Trainer
from quire.layers.cross_entropy import IGNORED
from quire.models import ModelSettings
from quire.models.gpt import GPTSettings
from quire.models.ngram import NgramSettings

STEPS, STOP = 9, 4  # an epoch of text.txt has 6
SHAPE = {"layers": 1, "embedding_size": 16, "heads": 2, "context_length": 16}
TRAINING = {"warmup_steps": 3, "learning_rate": 0.01, "steps": STEPS}
BATCH = 3
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
         "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip


def write_text(folder: Path) -> Path:
    """A text of 600 characters, of which 540 are trained on: 34 windows."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(40)]
    path = folder / "text.txt"
    path.write_text(" ".join(generator.choices(words, k=200))[:600])
    return path


def fitted(
    folder: Path,
    name: str,
    processes: int = 1,
    *,
    model: ModelSettings | None = None,
    dropout: float = 0.1,
    training: dict[str, Any] | None = None,
    loader: DataLoader[Any] | None = None,
    ckpt_path: str | None = None,
    kind: type[pl.Trainer] = Trainer,
    **arguments: Any,
) -> pl.Trainer:
    """A training of a tiny model on text.txt, or on what `loader` gives."""
    data = TextData(str(folder / "text.txt"), tokenizer="character", batch_size=BATCH)
    settings = data.fitted(model or GPTSettings(**SHAPE, dropout=dropout))
    module = LanguageModel(settings, {**TRAINING, **(training or {})})
    own = {"accumulate_grad_batches": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 1, "max_steps": STEPS}
    own |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder / name}
    own |= {"accelerator": "cpu", "devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    trainer = kind(**{**own, **arguments})
    trainer.fit(module, data if loader is None else loader, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    return trainer


def stopped_and_resumed(folder: Path, name: str, processes: int = 1, stop: int = STOP, **options: Any) -> None:
    """The same training, stopped after some steps, and resumed from the checkpoint that the Trainer left."""
    first = fitted(folder, f"{name}-first", processes, **options, max_steps=stop)
    assert first.checkpoint_callback is not None
    fitted(folder, name, processes, **options, ckpt_path=first.checkpoint_callback.best_model_path)


def ragged(processes: int) -> DataLoader[Any]:
    """A plain loader of rows of which very different shares are targets; four at a time in all processes together."""
    tokens = torch.randint(9, (16, 17), generator=torch.Generator().manual_seed(1))
    rows = []
    for number, row in enumerate(tokens):
        targets = row[1:].clone()
        targets[1 + number % 15 :] = IGNORED
        rows.append((row[:-1], targets))
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = DistributedSampler(rows, num_replicas=processes, rank=rank, shuffle=False)  # type: ignore[arg-type]
    return DataLoader(rows, batch_size=4 // processes, sampler=sampler)  # type: ignore[arg-type]


def rows(**options: Any) -> DataLoader[Any]:
    """A plain loader of 16 rows, two at a time in each process."""
    tokens = torch.randint(9, (16, 17), generator=torch.Generator().manual_seed(1))
    return DataLoader([(row[:-1], row[1:]) for row in tokens], batch_size=2, **options)  # type: ignore[arg-type]


def curves(folder: Path, processes: int) -> None:
    """What must not depend on the number of processes."""
    fitted(folder, "curve", processes, dropout=0.0)
    fitted(folder, "ngram", processes, model=NgramSettings(kind="ngram", **SHAPE, ngram_rows=64), max_steps=3)
    fitted(folder, "ragged", processes, dropout=0.0, loader=ragged(processes), max_steps=3)


def main(folder: Path, processes: int) -> None:
    """All that is compared; the second process does not read the text."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        sys.addaudithook(refuse_text)
    curves(folder, processes)
    fitted(folder, "whole", processes)
    stopped_and_resumed(folder, "parts", processes)
    for name, together in (("shuffled", True), ("apart", False)):  # by one order, or each process by its own
        options = {"loader": rows(shuffle=True), "use_distributed_sampler": together}
        fitted(folder, name, processes, **options)
        stopped_and_resumed(folder, f"{name}-parts", processes, **options, stop=6 if together else 2)


def refuse_text(event: str, arguments: tuple[Any, ...]) -> None:
    """No opening of text.txt, as an audit hook."""
    if event == "open" and str(arguments[0]).endswith("text.txt"):
        raise RuntimeError("A process that does not lead reads the text.")


# ---- what is compared ----


def loaded(path: Path) -> dict[str, Any]:
    """A checkpoint."""
    return torch.load(path, weights_only=True)


def logged(folder: Path, name: str) -> dict[str, list[float]]:
    """What CSVLogger wrote, by name."""
    with (folder / name / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def different(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two trees of tensors and plain values are not the same bits."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict):
        same = [] if one.keys() == other.keys() else [f"{where}: names"]
        return same + [
            each for key in one.keys() & other.keys() for each in different(one[key], other[key], f"{where}.{key}")
        ]
    if isinstance(one, (list, tuple)):
        same = [] if len(one) == len(other) else [f"{where}: length"]
        return same + [each for n, pair in enumerate(zip(one, other)) for each in different(*pair, f"{where}.{n}")]
    return [] if one == other else [where]


def assert_same_training(folder: Path, one: str, other: str) -> None:
    """Weights, optimizer, schedule, place in the text, random generators: everything but Lightning's own counters."""
    first, second = loaded(folder / f"{one}.ckpt"), loaded(folder / f"{other}.ckpt")
    for part in {"state_dict", "optimizer_states", "lr_schedulers", "TextData", "quire", "global_step"} & first.keys():
        assert not different(first[part], second[part], part)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
