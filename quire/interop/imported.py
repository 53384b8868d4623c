"""From a foreign model to a run directory: a run like any other, without text and metrics, few with held-out text."""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import quire
from quire import checkpoint, files
from quire.config import Table, from_table, to_table
from quire.devices import memory_bytes
from quire.errors import UserError
from quire.layers.kneser_ney import KneserNey
from quire.models import MODELS
from quire.progress import bar, say
from quire.run import Run, empty_model, refuse_existing
from quire.tokenizers import Tokenizer
from quire.training.settings import TrainingSettings

# Nothing is known of its training but that the separator ended its texts: as often as Run.start_token() asks for.
SEPARATORS = 100


class Importer(NamedTuple):
    """What makes a neighbour's files importable."""

    recognizes: Callable[[Path], bool]  # whether a path is such a model, by its first bytes or the names in a folder
    read: Callable[[Path, Path | None], "Foreign"]  # the path, and the tokenizer's file where that is named apart


@dataclass
class Foreign:
    """A model as a neighbour's file describes it, checked, its weights not read yet."""

    settings: Table  # of the model: `kind` and the fields of that kind; vocabulary and separator are the tokenizer's
    tensors: Iterable[tuple[str, Tensor]]  # by Quire's names, one after the other; without the head where it is tied
    tokenizer: Tokenizer
    origin: Table  # format, path, bytes, sha256
    prompt_prefix: list[int] = field(default_factory=list)  # tokens before every prompt, as the model was trained
    notes: Table = field(default_factory=dict)  # for the manifest: name, licence, attribution, chat_template
    training: Table | None = None  # settings that it was trained with; None: not known, and gentle ones are taken
    data: Table = field(default_factory=dict)  # settings by which its text was read
    validation: np.ndarray | None = None  # held-out tokens, with "validation" in the notes
    counts: KneserNey | None = None  # of its training text


def halves(weight: Tensor, size: int) -> Tensor:
    """Rows of a query or key map whose rotary pairs are (2i, 2i + 1), in the order in which pairs are (i, i + D/2).

    `weight` is (H D, C), or a bias (H D); `size` is D. See `neighbours` for the way back.
    """
    heads = weight.unflatten(0, (-1, size // 2, 2))  # (H, D/2, 2, C)
    return heads.transpose(1, 2).flatten(0, 2)


def neighbours(weight: Tensor, size: int) -> Tensor:
    """The inverse of `halves`: rows whose rotary pairs are (i, i + D/2), in the order of pairs (2i, 2i + 1)."""
    heads = weight.unflatten(0, (-1, 2, size // 2))  # (H, 2, D/2, C)
    return heads.transpose(1, 2).flatten(0, 2)


def create(foreign: Foreign, path: Path, context_length: int = 0) -> Run:
    """Write the run directory of a foreign model, whole or not at all; one that exists is refused.

    Needs memory for the weights in float32 twice, and disk for them once: too little is a UserError before any work.
    """
    settings = foreign.settings | {
        "vocabulary_size": foreign.tokenizer.vocabulary_size,
        "separator": foreign.tokenizer.separator,
    }
    if context_length:
        settings["context_length"] = shortened(settings["context_length"], context_length)
    typed = from_table(MODELS[settings["kind"]].Settings, settings, "model")
    refuse_existing(path)
    model = empty_model(typed, torch.device("cpu"))  # memory is taken only as weights come in
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    check_room(path, size)
    fill(model, foreign)
    training = foreign.training or to_table(training_settings(foreign))
    config = {**({"data": foreign.data} if foreign.data else {}), "model": to_table(typed), "training": training}
    tensors, about = checkpoint.model_tensors(model), manifest(foreign)

    def write(folder: Path) -> None:
        Run.create(folder, config, foreign.tokenizer, about, foreign.validation, {}, tensors, foreign.counts)

    try:
        files.replace_folder(path, write)
    finally:
        shutil.rmtree(files.beside(path), ignore_errors=True)  # there only where something failed
    return Run(path)


def shortened(own: int, wanted: int) -> int:
    """The context length to keep of a model's own."""
    if not 2 <= wanted <= own:
        raise UserError(f"--context-length must be between 2 and the model's own {own}, not {wanted}.")
    return wanted


def check_room(path: Path, size: int) -> None:
    """Refuse weights of `size` bytes in float32 where memory or disk cannot hold them."""
    memory, free = memory_bytes(), disk_free(path)
    need = 2 * size  # the weights, and what is written of them
    if memory and need > memory:
        raise UserError(
            f"Importing this model takes about {gigabytes(need)} of memory (weights in float32, twice); this machine"
            f" has {gigabytes(memory)}. Import a smaller one."
        )
    if size > free:
        raise UserError(
            f"The run needs {gigabytes(size)} on the disk of {path.parent}, where {gigabytes(free)} are free."
            " Make room, or name a --run on another disk."
        )
    if need > 1 << 30:
        say(f"{size // 4:,} parameters in float32: {gigabytes(size)} on disk, meanwhile {gigabytes(need)} of memory.")


def disk_free(path: Path) -> int:
    """Free bytes on the disk where `path` is going to be."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def gigabytes(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.2f} GB"


def fill(model: torch.nn.Module, foreign: Foreign) -> None:
    """Copy the foreign tensors into the model; one missing, unknown or of another shape is a UserError naming it."""
    own, where = checkpoint.model_tensors(model), foreign.origin["path"]
    count = len(own)
    with torch.no_grad(), bar("importing") as show:
        for name, tensor in foreign.tensors:
            if name not in own:
                raise UserError(f"{where} has a tensor {name} that a model of its settings has no place for.")
            place = own.pop(name)
            if name == "positions.weight":  # learned: as many as are to be kept
                tensor = tensor[: len(place)]
            if place.shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} instead of {tuple(place.shape)}"
                raise UserError(f"{where} is damaged: its tensor {name} is {shapes}.")
            place.copy_(tensor)
            show(1 - len(own) / count)
    if own:
        raise UserError(f"{where} is incomplete: it lacks {', '.join(sorted(own)[:5])}.")


def training_settings(foreign: Foreign) -> TrainingSettings:
    """What fine-tuning starts from (with a quarter of the learning rate): gentle, and few windows at once."""
    return TrainingSettings(
        tokenizer=foreign.tokenizer.kind, batch_size=4, learning_rate=2e-4, weight_decay=0.01, warmup_steps=20
    )


def manifest(foreign: Foreign) -> Table:
    """manifest.json of an imported run: where the model came from, and what is kept with it."""
    from importlib.metadata import version

    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"quire": quire.__version__, **{name: version(name) for name in ("torch", "numpy", "safetensors")}},
        "imported_from": foreign.origin,
        "prompt_prefix": foreign.prompt_prefix,
        "data": [],
        "separators": SEPARATORS,
        **foreign.notes,
    }
