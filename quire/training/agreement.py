"""The proof that several processes train as one does: the same small trainings, by one process and by all, compared.

Every process trains alone, on every batch as a whole, and then together with the others; the losses of all steps are to
agree to rounding, and in the end all processes are to have the same parameters, bit for bit.
"""

import random
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quire.config import to_table
from quire.models.gpt import GPTSettings
from quire.run import Run
from quire.tokenizers import TOKENIZERS
from quire.training.distributed import ALONE, World
from quire.training.loop import Trainer
from quire.training.settings import TrainingSettings

STEPS = 50
TOLERANCE = 1e-5  # of a loss, relative
LOW_TOLERANCE = 1e-2  # of Muon's on a GPU, where it orthogonalizes in bfloat16
LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"
ROWS = 12  # windows of a batch: for 1, 2, 3 and 4 processes an equal share

# What is trained: by name, the settings that differ from the rest.
WAYS: dict[str, dict[str, Any]] = {
    "adamw, ddp": {},
    "adamw, ddp, accumulated": {"accumulation_steps": 2},
    "adamw, ddp, unequal shares": {},  # of one window more than three for each process
    "muon, ddp": {"optimizer": "muon"},
    "muon, ddp, accumulated": {"optimizer": "muon", "accumulation_steps": 2},
    "adamw, ddp, by hand": {"engine": "manual"},
    "adamw, fsdp": {"parallel": "fsdp"},
    "adamw, fsdp, accumulated": {"parallel": "fsdp", "accumulation_steps": 2},
    "adamw, fsdp, recomputed": {"parallel": "fsdp", "gradient_checkpointing": True},
}  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """Of one way to train: the largest difference of a loss from that of one process, relative, and whether all
    processes have the same parameters."""

    way: str
    difference: float
    same_parameters: bool
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether it is as it should be."""
        return self.difference <= self.tolerance and self.same_parameters


def agreements(world: World, device: torch.device, steps: int = STEPS) -> list[Agreement]:
    """Train in each of the WAYS, alone and together; all processes call this, and get the same."""
    base = TrainingSettings(steps=steps, learning_rate=3e-3, schedule="constant", warmup_steps=5, batch_size=ROWS,
                            precision="float32", compile="no")  # fmt: skip
    alone: dict[TrainingSettings, list[float]] = {}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        run, tokens = small_run(Path(folder) / "run")
        for name, way in WAYS.items():
            rows = 3 * world.size + 1 if name.endswith("unequal shares") else max(ROWS, world.size)
            settings = replace(base, batch_size=rows, **way)
            single = replace(settings, parallel="ddp", engine="autograd", gradient_checkpointing=False)
            if single not in alone:
                alone[single], _ = trained(run, single, tokens, device, ALONE, steps)
            together, checksum = trained(run, settings, tokens, device, world, steps)
            off = max(abs(one - other) / other for one, other in zip(together, alone[single], strict=True))
            checksums = world.gathered(torch.tensor([checksum]))
            same = all(torch.equal(each, checksums[0]) for each in checksums)
            low = device.type == "cuda" and settings.optimizer == "muon"
            found.append(Agreement(name, world.largest(off), same, LOW_TOLERANCE if low else TOLERANCE))
    return found


def trained(
    run: Run, settings: TrainingSettings, tokens: np.ndarray, device: torch.device, world: World, steps: int
) -> tuple[list[float], int]:
    """The losses of the first steps, and a checksum of the parameters after them."""
    trainer = Trainer(run, settings, tokens, device, time.time(), world)
    trainer.begin()
    trainer.wrap_model()
    losses = []
    for _ in range(steps):
        before = trainer.state.loss_sum
        trainer.update()
        losses.append(trainer.state.loss_sum - before)
    checksum = 0
    for parameter in trainer.model.parameters():
        whole = parameter.full_tensor() if trainer.sharded else parameter
        checksum = zlib.crc32(whole.detach().cpu().numpy().tobytes(), checksum)
    return losses, checksum


def small_run(path: Path) -> tuple[Run, np.ndarray]:
    """A small run, the same wherever it is made, and the tokens to train it on."""
    generator = random.Random(0)
    words = ["".join(generator.choices(LETTERS, k=generator.randint(2, 6))) for _ in range(80)]
    text = "".join(generator.choices(words, k=6000))
    tokenizer = TOKENIZERS["character"].train([text])
    tokens = np.array([tokenizer.separator, *tokenizer.encode(text)])
    settings = GPTSettings(vocabulary_size=tokenizer.vocabulary_size, context_length=32, embedding_size=32, layers=2,
                           heads=2, dropout=0.0, separator=tokenizer.separator)  # fmt: skip
    manifest = {"validation": {"bytes": 1000}, "separators": 1}
    run = Run.create(path, {"model": to_table(settings)}, tokenizer, manifest, tokens[:1000], {})
    return run, tokens[1000:]
