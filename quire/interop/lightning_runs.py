"""From a Lightning module or its checkpoint to a run directory: what a model needs beside its weights.

A checkpoint carries that under the key "quire": settings, tokenizer, what a run knows of its text, and of the held-out
text the tokens. All of it is tensors and plain values, so that torch reads it with weights_only: nothing in it runs.
"""

import json
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quire import checkpoint, files
from quire.config import Table, to_table
from quire.errors import UserError
from quire.interop.imported import Foreign, create, manifest
from quire.interop.json_file import tokenizer_of
from quire.layers.kneser_ney import KneserNey
from quire.models import ModelSettings
from quire.run import Run, refuse_existing
from quire.tokenizers import Tokenizer, load_tokenizer
from quire.training.finetune import KEPT
from quire.training.settings import Settings, typed

KEY = "quire"  # in a checkpoint
PREFIX = "model."  # of the weights' names there
GPT2_VOCABULARY, GPT2_SEPARATOR = 50257, 50256
MOST_HELD_OUT = 1 << 24  # tokens that each checkpoint carries along, at most; the default is far below


@dataclass
class Kept:
    """What is known of a model's tokenizer and text; empty where it was trained on batches of other making."""

    tokenizer: Tokenizer | None = None
    notes: Table = field(default_factory=dict)  # for manifest.json, over what every imported run has there
    data: Table = field(default_factory=dict)  # config.toml's [data]
    validation: np.ndarray | None = None  # the held-out tokens

    def to_table(self) -> Table:
        """As tensors and plain values."""
        known = self.tokenizer
        return {
            "tokenizer": json.dumps({"kind": known.kind, **known.to_table()}) if known else "",
            "notes": self.notes,
            "data": self.data,
            "validation": None if self.validation is None else torch.from_numpy(self.validation.astype(np.int32)),
        }

    @classmethod
    def from_table(cls, table: Table) -> "Kept":
        """The inverse."""
        known = tokenizer_of(Path("the checkpoint"), json.loads(table["tokenizer"])) if table["tokenizer"] else None
        tokens = table["validation"]
        return cls(known, table["notes"], table["data"], None if tokens is None else tokens.numpy())

    @classmethod
    def of_run(cls, run: Run) -> "Kept":
        """What a run knows."""
        notes = {name: run.manifest[name] for name in (*KEPT, "separators", "pairs") if name in run.manifest}
        kept = cls(run.tokenizer, notes, run.config.get("data", {}))
        if "validation" in run.manifest and run.manifest["validation"]["tokens"] <= MOST_HELD_OUT:
            kept.hold_out(run.validation_tokens(), run.manifest["validation"])
        return kept

    def hold_out(self, tokens: np.ndarray, about: Table) -> None:
        """Keep the held-out tokens; of what is known `about` them, the bytes and how they were chosen."""
        self.validation = tokens
        self.notes["validation"] = {name: about[name] for name in ("bytes", "chosen_as")}


class Unsaved(Run):
    """A run that is nowhere on disk: what writing with a model asks of a run."""

    def __init__(self, settings: ModelSettings, tokenizer: Tokenizer, kept: Kept) -> None:
        self.path, self.config = Path("."), {"data": kept.data}
        about = manifest(Foreign({}, [], tokenizer, {}, [], kept.notes))
        self.__dict__.update(settings=settings, tokenizer=tokenizer, manifest=about)


def settled_tokenizer(settings: ModelSettings, kept: Kept, given: Tokenizer | str | Path | None) -> Tokenizer:
    """A model's tokenizer: the one `given` (or its path or name), or its text's, or GPT-2's where its size says so."""
    if given is not None:
        known = given if isinstance(given, Tokenizer) else load_tokenizer(given)
    elif kept.tokenizer is not None:
        known = kept.tokenizer
    elif settings.vocabulary_size == GPT2_VOCABULARY:
        known = gpt2_tokenizer()
    else:
        raise UserError(
            f"The tokenizer of this model (vocabulary {settings.vocabulary_size:,}) is not known: it was not trained"
            " on a TextData. Name it (a tokenizer file or a run): tokenizer=PATH, or for a command --tokenizer PATH."
        )
    check_fit(known, settings, "Name this model's own: tokenizer=PATH")
    return known


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer; where it cannot be had, the sentence says why it is wanted."""
    try:
        return load_tokenizer("gpt2")
    except UserError as error:
        raise UserError(
            f"A vocabulary of {GPT2_VOCABULARY:,} implies GPT-2's tokenizer, and a TextData has it by default. {error}"
            " Or name another: tokenizer=PATH"
        ) from error


def check_fit(tokenizer: Tokenizer, settings: ModelSettings, remedy: str) -> None:
    """Refuse a tokenizer that is not the model's."""
    size, separator, differs = tokenizer.vocabulary_size, tokenizer.separator, ""
    if size != settings.vocabulary_size:
        differs = f"The tokenizer has {size:,} tokens, and the model {settings.vocabulary_size:,}"
    elif settings.separate_documents and separator != settings.separator:
        differs = f"The tokenizer's separator is {separator}, and the model knows documents by {settings.separator}"
    if differs:
        raise UserError(f"{differs}: it is another model's. {remedy}")


def to_run(
    source: nn.Module | str | Path,
    path: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    context_length: int = 0,
) -> Run:
    """Make a run directory of a LanguageModel, or of a Lightning checkpoint of one; its weights are the same bits.

    The run writes, is measured (on the held-out text of its TextData, where it had one) and fine-tuned as any that was
    imported. `tokenizer` is needed where the model does not know its own; `context_length` keeps less of its context. A
    `path` that exists is refused.
    """
    path = Path(path)
    refuse_existing(path)
    found = of_module(source, tokenizer) if isinstance(source, nn.Module) else read(Path(source), tokenizer)
    return create(found, path, context_length)


def of_module(module: Any, tokenizer: Tokenizer | str | Path | None) -> Foreign:
    """The model of a LanguageModel."""
    origin = {"format": "lightning", "path": f"a {type(module).__name__} of Lightning"}
    tensors, counts = checkpoint.model_tensors(module.model), getattr(module.model, "counts", None)
    return described(module.whole, module.kept, tensors, counts, origin, tokenizer)


def recognizes(path: Path) -> bool:
    """Whether a path is a file named .ckpt."""
    return path.is_file() and path.suffix == ".ckpt"


def read(path: Path, tokenizer: Tokenizer | str | Path | None) -> Foreign:
    """The model of a checkpoint."""
    table = contents(path)
    about, state = table.get(KEY), table.get("state_dict")
    if not isinstance(about, dict) or not isinstance(state, dict):
        raise UserError(
            f"{path} is no checkpoint of a LanguageModel of quire.interop.lightning: Quire's part is not there."
        )
    settings = typed({"model": about["model"], "training": about["training"]})
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    origin = {"format": "lightning", "path": str(path), "bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
    origin |= {"step": table["global_step"]}
    counts = counts_of(settings.model, about["counts"])
    return described(settings, Kept.from_table(about), tensors, counts, origin, tokenizer)


def described(
    settings: Settings,
    kept: Kept,
    tensors: dict[str, Tensor],
    counts: KneserNey | None,
    origin: Table,
    tokenizer: Tokenizer | str | Path | None,
) -> Foreign:
    """All of it as an importer gives it."""
    known = settled_tokenizer(settings.model, kept, tokenizer)
    training = to_table(settings.training) | {"tokenizer": known.kind}
    found = Foreign(to_table(settings.model), tensors.items(), known, origin, [], kept.notes, training, kept.data)
    return replace(found, validation=kept.validation, counts=counts)


def counts_of(settings: ModelSettings, tables: dict[str, Tensor]) -> KneserNey | None:
    """What was counted in the training text of a model, if anything was."""
    if not tables:
        return None
    separator = settings.separator if settings.separate_documents else None
    return KneserNey.from_tables(tables, settings.vocabulary_size, "cpu", separator)


def contents(path: str | Path, reader: Any = None) -> Table:
    """A checkpoint by Lightning's `reader` (None: of files), every byte checked first: torch looks at no checksum."""
    try:
        from lightning.pytorch.plugins.io import TorchCheckpointIO
    except ImportError as error:
        raise UserError('Lightning checkpoints need the package lightning: pip install "quire[lightning]".') from error
    check(path)
    try:
        table = (reader or TorchCheckpointIO()).load_checkpoint(path, weights_only=True)
    except Exception as error:  # what torch raises for a file that is no checkpoint has many types
        raise UserError(
            f"{path} is no checkpoint of Lightning's, or holds more than plain values and tensors."
        ) from error
    if not isinstance(table, dict):
        raise UserError(f"{path} is no checkpoint of Lightning's: it holds a {type(table).__name__}.")
    return table


def check(path: str | Path) -> None:
    """Refuse a checkpoint that is missing, cut off or damaged; one elsewhere, as s3://..., is left to Lightning."""
    if "://" in str(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError as error:
        raise UserError(f"There is no checkpoint {path}.") from error
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} is no checkpoint of Lightning's, or it is cut off or damaged.") from error
    if damaged:
        raise UserError(f"{path} is damaged: its part {damaged} does not match its checksum. Restore it from a copy.")


def tables_of(settings: Settings, kept: Kept, model: Any) -> Table:
    """What a checkpoint carries under KEY, but for the random generators."""
    counts = getattr(model, "counts", None)
    return {
        "model": to_table(settings.model),
        "training": to_table(settings.training),
        "counts": counts.tables() if counts is not None else {},
        **kept.to_table(),
    }
