"""A text as Lightning takes it: batches for training, each process its part, and the whole held-out text to measure on.

The windows and their order are Quire's own (data/batches.py): a function of seed and position alone, which a
checkpoint carries, so that a training that was stopped goes on with the very next window.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from quire import processes
from quire.config import Table, to_table
from quire.data.batches import Batches, Cursor
from quire.data.pairs import Examples, Pairs
from quire.data.prepare import Prepared, prepared_by_another
from quire.errors import UserError
from quire.evaluation.loss import held_out_batches
from quire.interop.lightning_runs import MOST_HELD_OUT, Kept, check_fit, gpt2_tokenizer
from quire.models import ModelSettings
from quire.training.distributed import World
from quire.training.settings import TrainingSettings, typed
from quire.training.texts import given_text, load_data, with_its_tokenizer
from quire.training.train import check_pairs, fitted, fitting_pairs

GPT2 = "gpt2"  # the tokenizer where none is named


class TextData(pl.LightningDataModule):
    """A text, or pairs of source and target, to train a LanguageModel on: `trainer.fit(model, TextData("book.txt"))`.

    Of each batch of `batch_size` windows every process takes its part, so that any number of processes trains on the
    same batches. An epoch is as many whole steps as cover the text. Validation is over the whole held-out text, each
    token predicted once.
    """

    def __init__(
        self,
        *texts: str,
        tokenizer: str | None = None,
        batch_size: int = TrainingSettings.batch_size,
        vocabulary_size: int = 0,
        seed: int = TrainingSettings.seed,
        **data: Any,
    ) -> None:
        """`texts` as `quire train` takes them, without any the built-in corpus; `tokenizer` a kind to fit, with
        `vocabulary_size`, or a path or a name (without one GPT-2's, or that of a prepared text); `data` are fields of
        DataSettings: pairs, validation, documents ..."""
        super().__init__()
        own = {"vocabulary_size": vocabulary_size, "batch_size": batch_size, "seed": seed}
        training = {"tokenizer": tokenizer or GPT2, **own}
        settings = typed({"data": {**data, "text": list(texts)}, "training": training})
        if "-" in settings.data.named:
            raise UserError(
                "Lightning's processes cannot share standard input. Write the text to a file, and name that."
            )
        if tokenizer is None:
            settings = with_its_tokenizer(settings, ("vocabulary_size",) if vocabulary_size else ())
        self.settings, _ = given_text(settings)
        named = json.dumps(self.settings.tables()).encode()
        self.told = f"QUIRE_LIGHTNING_{hashlib.sha256(named).hexdigest()[:16]}"  # what has its name in the cache
        self.cursor = Cursor()  # the next window
        self.taken = 0  # batches of this epoch

    # ---- the text ----

    @cached_property
    def loaded(self) -> tuple[Prepared, list[Table]]:
        """The text, read and encoded (or found in the cache), and where it came from.

        One process reads it. The others, which Lightning starts with its environment, take what is in the cache under
        the name that they find there; where it came from is then not known, and only the first writes that.
        """
        if not processes.leads() and (found := prepared_by_another(os.environ.get(self.told, ""))):
            return found, []
        if self.settings.training.tokenizer == GPT2:
            gpt2_tokenizer()
        self.settings, prepared, origins = load_data(self.settings)
        os.environ[self.told] = prepared.key
        return prepared, origins

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the text is encoded by."""
        return self.loaded[0].tokenizer

    def fitted(self, model: ModelSettings | Table) -> ModelSettings:
        """A model's settings as this text needs them: its tokenizer's vocabulary, a context no longer than the text."""
        table = model if isinstance(model, dict) else to_table(model)
        settings = replace(self.settings, model=typed({"model": table}).model)
        check_pairs(settings)
        return fitted(settings, self.loaded[0])[0].model

    def kept(self, before: Kept) -> Kept:
        """What a model that is trained on this text knows of it, beside what it knew `before`."""
        prepared, origins = self.loaded
        separators = max(prepared.report["training_documents"], before.notes.get("separators", 0))
        notes = {**before.notes, "separators": separators, "trained_on": origins}
        notes.pop("validation", None)
        kept = Kept(prepared.tokenizer, notes, to_table(self.settings.data))
        if len(prepared.validation) <= MOST_HELD_OUT:
            about = {"bytes": int(self.validation_bytes), "chosen_as": prepared.report["held_out_as"]}
            kept.hold_out(np.asarray(prepared.validation[:]), about)
        return kept

    # ---- Lightning's hooks ----

    def prepare_data(self) -> None:
        """One process of a machine fills the cache, in which the others find the tokens."""
        _ = self.loaded

    def setup(self, stage: str) -> None:
        """Cut the text into what the model takes; refuse a model that is not for its tokenizer."""
        model = self.attached.lightning_module
        shape, kept = getattr(model, "settings", None), getattr(model, "kept", None)
        if not isinstance(shape, ModelSettings) or not isinstance(kept, Kept):
            raise UserError(f"TextData feeds a LanguageModel of quire.interop.lightning, not a {type(model).__name__}.")
        os.environ[self.told] = self.attached.strategy.broadcast(os.environ.get(self.told, ""))
        prepared, _ = self.loaded
        check_tokenizer(prepared, shape, kept)
        shape = replace(shape, separator=prepared.tokenizer.separator)
        settings = replace(self.settings, model=shape)
        check_pairs(settings)
        if settings.data.pairs:
            prepared = fitting_pairs(settings, prepared)
        self.shape, self.validation_bytes = shape, prepared.validation_bytes
        world, size, seed = self.attached.world_size, settings.training.batch_size, settings.training.seed
        if size < world:
            raise UserError(
                f"A batch of {size} has no part for each of {world} processes. Give TextData a larger batch_size."
            )
        self.validation = self.examples(prepared.validation, seed)
        self.predictions = len(self.validation) - (not settings.data.pairs)  # a stream's first token is context only
        training = self.examples(prepared.training, seed)
        self.batches = training if isinstance(training, Pairs) else Batches(training, shape.context_length, seed)
        if not self.attached.global_step:  # a checkpoint's place is put back after this
            self.cursor, self.taken = Cursor(), 0

    def examples(self, tokens: Any, seed: int) -> Examples:
        """A token stream as the model takes it."""
        shape, pairs = self.shape, self.settings.data.pairs
        return Pairs(tokens, shape.separator, shape.context_length, seed, shape.reads_source) if pairs else tokens

    def train_dataloader(self) -> "Training":
        """The batches to train on."""
        return Training(self)

    def val_dataloader(self) -> "HeldOut":
        """The held-out text."""
        return HeldOut(self)

    def state_dict(self) -> Table:
        """The place in the text."""
        return {**asdict(self.cursor), "taken": self.taken}

    def load_state_dict(self, state: Table) -> None:
        """Go on from there."""
        self.cursor, self.taken = Cursor(state["epoch"], state["position"]), state["taken"]

    @property
    def attached(self) -> pl.Trainer:
        """The Trainer that it was given to."""
        if self.trainer is None:
            raise UserError("Give the text itself to the Trainer, not one of its loaders: trainer.fit(model, data).")
        return self.trainer


def check_tokenizer(prepared: Prepared, shape: ModelSettings, kept: Kept) -> None:
    """Refuse a text that is encoded by another tokenizer than the model's."""
    known, own = prepared.tokenizer, kept.tokenizer
    check_fit(
        known, shape, "Name the model's, TextData(text, tokenizer=PATH), or make a model of data.fitted(settings)."
    )
    if own is not None and (own.kind, own.to_table()) != (known.kind, known.to_table()):
        raise UserError(
            "The text is encoded by another tokenizer than the one this model was trained with. Name that:"
            " TextData(text, tokenizer=RUN)."
        )


class Training:
    """The training batches of one process, its part of each, without end; its length is that of an epoch.

    Each is a dictionary: tokens, targets, and source where the model reads one. The parts of others are not read.
    """

    def __init__(self, data: TextData) -> None:
        self.data, self.trainer = data, data.attached

    def __len__(self) -> int:
        """Batches that cover the text, in whole steps."""
        step = self.data.settings.training.batch_size * self.trainer.accumulate_grad_batches
        return -(-self.data.batches.examples() // step) * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        data, trainer, size = self.data, self.trainer, self.data.settings.training.batch_size
        share = World(trainer.global_rank, trainer.world_size).share(size)
        while True:
            if data.taken >= trainer.num_training_batches:
                data.taken = 0
            data.taken += 1  # as it is, with the cursor, when this batch has been trained on
            yield data.batches.take(data.cursor, size, share).arguments()

    def state_dict(self) -> Table:
        """Nothing: its place is the data module's, which Lightning puts back at an epoch's beginning too."""
        return {}

    def load_state_dict(self, state: Table) -> None:
        """Nothing."""


class HeldOut:
    """The held-out text in batches, of which each process takes every so manieth."""

    def __init__(self, data: TextData) -> None:
        self.data, self.trainer = data, data.attached

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        shape, trainer = self.data.shape, self.trainer
        sizes, device = (shape.context_length, shape.vocabulary_size), trainer.strategy.root_device
        batches = held_out_batches(self.data.validation, *sizes, device)
        for batch in islice(batches, trainer.global_rank, None, trainer.world_size):
            yield batch.arguments()
