"""The run directory: all that is needed to use, evaluate, copy or delete a model.

A model is named by its run directory in every command and every call.
"""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from quire import checkpoint, files
from quire.config import Table, from_table, read_checked_toml, write_checked_toml
from quire.data.pairs import Examples, Pairs
from quire.data.shards import TokenStream, token_type
from quire.devices import choose_device
from quire.errors import UserError, choose
from quire.layers.kneser_ney import KneserNey
from quire.models import MODELS, ModelSettings, build_model
from quire.tokenizers import Tokenizer, load_tokenizer

COUNTS = "data/counts.safetensors"


class Run:
    """A run directory. Opening reads nothing but its configuration; the rest is read when asked for."""

    def __init__(self, path: str | Path) -> None:
        """Open the run at `path`; a UserError says what is missing."""
        self.path = Path(path)
        if not (self.path / "config.toml").is_file():
            raise UserError(f"{path} is not a run: it has no config.toml. `quire runs` lists the runs here.")
        self.config: Table = read_checked_toml(self.path / "config.toml")

    @classmethod
    def create(
        cls,
        path: Path,
        config: Table,
        tokenizer: Tokenizer,
        manifest: Table,
        validation: np.ndarray | None,
        kept: dict[str, bytes],
        model: checkpoint.Tensors | None = None,
        counts: KneserNey | None = None,
    ) -> "Run":
        """Make the directory with everything but a checkpoint; one that exists is refused, never overwritten.

        An imported model comes along as `model`, and becomes the checkpoint `best`; few have a held-out text. `kept`
        are further files by name, `counts` what was counted in the training text. config.toml comes last: a directory
        that has it is a whole run.
        """
        refuse_existing(path)
        path.mkdir(parents=True, exist_ok=True)
        try:
            files.write_json(path / "manifest.json", manifest)  # first too: it says whose a folder is that a kill left
            if model is not None:
                checkpoint.save(path / "checkpoints" / "best", model, {}, {})
            if validation is not None:
                data = validation.astype(token_type(tokenizer.vocabulary_size)).tobytes()
                held_out = {**manifest["validation"], "tokens": len(validation), "crc32": files.crc32(data)}
                files.write_bytes(path / "data" / "validation.bin", data)
                manifest = {**manifest, "validation": held_out}
            if counts is not None:
                manifest = {**manifest, "counts": checkpoint.write_tensors(path / COUNTS, counts.tables())}
            for name, content in kept.items():
                files.write_bytes(path / name, content)
            tokenizer.save(path / "tokenizer.json")
            files.write_json(path / "manifest.json", manifest)
            write_checked_toml(path / "config.toml", config)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return cls(path)

    # ---- its parts ----

    @cached_property
    def settings(self) -> ModelSettings:
        """The model's settings."""
        table = self.config.get("model", {})
        kind = choose(f"The model kind in {self.path / 'config.toml'}", table.get("kind", "gpt"), list(MODELS))
        return from_table(MODELS[kind].Settings, table, "model")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer this model was trained with."""
        tokenizer = load_tokenizer(self.path)
        if tokenizer.vocabulary_size != self.settings.vocabulary_size:
            raise UserError(f"{self.path / 'tokenizer.json'} is not this model's: its vocabulary has another size.")
        return tokenizer

    @cached_property
    def manifest(self) -> Table:
        """Versions, machine and data of the training."""
        if not (self.path / "manifest.json").is_file():
            raise UserError(f"{self.path} lacks its manifest.json. Restore it from a copy.")
        return files.read_json(self.path / "manifest.json")

    @property
    def imported(self) -> bool:
        """Whether its model came from another program: without training text and metrics, seldom with held-out text."""
        return "imported_from" in self.manifest

    @property
    def text_argument(self) -> str:
        """How a command names what its model can read: a text, or pairs where it answers such."""
        return "--pairs FILE" if self.pairs else "TEXT"

    def validation_tokens(self) -> np.ndarray:
        """The held-out tokens, a separator first."""
        path = self.path / "data" / "validation.bin"
        text = self.text_argument
        if self.imported and "validation" not in self.manifest:
            raise UserError(
                f"{self.path} was imported, without a held-out text. Name one: quire evaluate {self.path} {text}"
            )
        if not path.is_file():
            raise UserError(f"{path} is missing. Restore it, or evaluate on a text: quire evaluate {self.path} {text}")
        data = path.read_bytes()
        if files.crc32(data) != self.manifest["validation"]["crc32"]:
            raise UserError(f"{path} is damaged: it does not match its checksum. Restore it from a copy.")
        return np.frombuffer(data, dtype=token_type(self.tokenizer.vocabulary_size))

    @property
    def pairs(self) -> bool:
        """Whether it takes pairs: its model answers a source by a target. Other models go on with a text."""
        trained = bool(self.config.get("data", {}).get("pairs"))
        return self.settings.reads_source or trained or bool(self.manifest.get("pairs"))

    def examples(self, tokens: np.ndarray | TokenStream, seed: int = 0) -> Examples:
        """A token stream as this model takes it: as it is, or in pairs."""
        return self.in_pairs(tokens, seed) if self.pairs else tokens

    def in_pairs(self, tokens: np.ndarray | TokenStream, seed: int = 0) -> Pairs:
        """A token stream whose documents are source and target by turns."""
        shape = self.settings
        return Pairs(tokens, shape.separator, shape.context_length, seed, shape.reads_source)

    def start_token(self) -> int:
        """What an empty prompt starts from: the separator where training met it at least 100 times, else a newline.

        An imported model may name a token of its own for it.
        """
        if "start_token" in self.manifest:
            return self.manifest["start_token"]
        newline = self.tokenizer.encode("\n", unknown="skip")
        return newline[0] if newline and self.manifest["separators"] < 100 else self.tokenizer.separator

    def prompt_prefix(self) -> list[int]:
        """Tokens that stand before every prompt: none, but for imported models that were trained so."""
        return self.manifest.get("prompt_prefix", [])

    def never_written(self) -> list[int]:
        """Ids that generation leaves out: no special token but the separator, and that only where it was a target."""
        trained = {self.tokenizer.separator} if self.pairs or self.manifest["separators"] > 1 else set()
        return sorted(self.tokenizer.reserved() - trained)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first."""
        return files.read_lines(self.path / "metrics.jsonl")

    # ---- its model ----

    def folder(self, which: str) -> Path:
        """The folder of its checkpoint `best` or `last`."""
        return self.path / "checkpoints" / which

    def last_folder(self) -> Path | None:
        """The folder of the last checkpoint, or None where the run was stopped before its first.

        A checkpoint that was there once and is not now is a UserError: to begin anew would overwrite the best one.
        """
        folder = self.folder("last")
        if checkpoint.exists(folder):
            return folder
        evaluations = sum(row.get("validation_loss") is not None for row in self.metrics())
        if folder.exists() or evaluations > 1:
            raise UserError(
                f"{self.path} has lost its checkpoint {folder}, or a part of it. Restore it from a copy;"
                " the best model is in checkpoints/best, if that is there."
            )
        return None

    def checkpoint(self, training: bool = True) -> checkpoint.Checkpoint | None:
        """The last checkpoint, or None where the run was stopped before its first."""
        folder = self.last_folder()
        return None if folder is None else checkpoint.load(folder, training)

    def trained_folder(self) -> Path:
        """The folder of the best checkpoint, or of the last where there is no best yet."""
        folder = self.folder("best") if checkpoint.exists(self.folder("best")) else self.folder("last")
        if not checkpoint.exists(folder):
            raise UserError(f"{self.path} has no checkpoint yet. Train it first: quire resume {self.path}")
        return folder

    def model(self, device: str | torch.device = "auto") -> Any:
        """The trained model in evaluation mode: the best checkpoint, or the last where there is no best yet."""
        where = choose_device(device) if isinstance(device, str) else device
        folder = self.trained_folder()
        model = empty_model(self.settings, where)
        checkpoint.load_model_tensors(model, checkpoint.load(folder, training=False).model, folder)
        return self._with_counts(model, where).eval()

    def fresh_model(self, seed: int, device: torch.device) -> Any:
        """The model as `seed` initializes it: the same weights on every device."""
        torch.manual_seed(seed)
        return self._with_counts(build_model(self.settings).to(device), device)

    def _with_counts(self, model: Any, device: torch.device) -> Any:
        """The model, given what was counted in the training text where it wants that."""
        if sums := self.manifest.get("counts"):
            tables = checkpoint.read_tensors(self.path / COUNTS, sums)
            where = torch.device("cpu") if device.type == "mps" else device  # which has no float64
            separator = self.settings.separator if self.settings.separate_documents else None
            model.counts = KneserNey.from_tables(tables, self.settings.vocabulary_size, where, separator)
        return model


def empty_model(settings: ModelSettings, device: torch.device) -> Any:
    """A model whose weights are yet to be loaded: nothing is drawn from the random generator."""
    with device, _Undrawn():
        return build_model(settings)


class _Undrawn(TorchFunctionMode):
    """Leaves weights undrawn. (The usual way, over the meta device, has torch import its compiler for seconds.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def refuse_existing(path: Path) -> None:
    """A run is never overwritten, and neither is anything else."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        remedy = f", or go on with it: quire resume {path}" if (path / "config.toml").exists() else "."
        raise UserError(f"{path} exists already. Name another --run{remedy}")
