"""Loaders of a user's own, as any that Lightning takes: what a batch of theirs must be, and where an epoch goes on."""

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch import Tensor

from quire.data.batches import Batch
from quire.errors import UserError
from quire.layers.cross_entropy import IGNORED
from quire.models import ModelSettings
from quire.progress import say

WANTED = "A batch must be (tokens, targets), a dictionary of these two, or a quire Batch, of integers (B, T)"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def taken(batch: Any, model: ModelSettings, look: bool) -> dict[str, Tensor]:
    """What the model is called with: integers (B, T), cast to int64, T at most its context length.

    Where there is a `look` at them, each must also be below the vocabulary; on a GPU that waits for the numbers.
    """
    if isinstance(batch, Batch):
        found = batch.arguments()
    elif isinstance(batch, Mapping) and {"tokens", "targets"} <= set(batch):
        found = {name: batch[name] for name in ("tokens", "targets", "source") if name in batch}
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        found = dict(zip(("tokens", "targets"), batch, strict=True))
    else:
        raise UserError(f"{WANTED}; the loader gives a {type(batch).__name__}.")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS or tensor.dim() != 2:
            is_ = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{WANTED}; its {name} are {is_.removeprefix('torch.')}.")
        if tensor.shape[1] > model.context_length:
            raise UserError(
                f"The {name} of a batch are {tensor.shape[1]} long, and the model's context length is"
                f" {model.context_length}. Cut them, or make a model of a longer context (max_len, context_length)."
            )
        if look:
            check_range(name, tensor, model.vocabulary_size)
    tokens, targets = found["tokens"], found["targets"]
    if tokens.shape != targets.shape:
        raise UserError(f"Each token has one target, but a batch has {tuple(tokens.shape)} and {tuple(targets.shape)}.")
    return {name: tensor.long() for name, tensor in found.items()}


def check_range(name: str, tensor: Tensor, size: int) -> None:
    """Refuse what is no token of a vocabulary of that `size`."""
    counted = tensor if name == "tokens" else tensor[tensor != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < size:
        outside = int(counted.min()) if counted.min() < 0 else int(counted.max())
        ignored = "" if name == "tokens" else f", or {IGNORED} where it does not count"
        raise UserError(
            f"{outside} is among the {name} of a batch: each must be from 0 to {size - 1}, for the vocabulary of"
            f" {size:,}{ignored}."
        )


class Place:
    """How far a loader has come in its epoch, so that a training that was stopped goes on with the very next batch.

    Lightning asks a loader that has state_dict and load_state_dict. Any other begins its epoch again, in the order that
    it had drawn, and the batches that were trained on are passed over. The order comes from torch's generator, or
    from one of the sampler's own, which for the first epoch is as the program made it.
    """

    def __init__(self, batches: int = 0, drawn: Tensor | None = None) -> None:
        self.batches = batches  # of the epoch, trained on
        self.drawn = drawn  # the state from which the order of the epoch was drawn
        self.begun = torch.get_rng_state()

    def fit_begins(self) -> None:
        """Just before Lightning makes the loader begin an epoch, the first of this fit."""
        self.begun = torch.get_rng_state()

    def train_begins(self, trainer: pl.Trainer) -> bool:
        """Go on where a checkpoint was; gives whether torch's generators were drawn from for it."""
        loader, fetcher = trainer.train_dataloader, trainer.fit_loop._data_fetcher  # there is no public one
        assert fetcher is not None
        if stateful(loader):
            return False
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable")  # it is, by what follows
        if moved := self.drawn is not None:
            _set_sampler_epoch(loader, trainer.current_epoch)
            generator_of(loader).set_state(self.drawn)
            iter(fetcher)
        elif generator_of(loader) is torch.default_generator:
            self.drawn = self.begun
        if self.batches:
            say(f"{self.batches} batches of this epoch were trained on: the loader gives them again, to pass over.")
            try:
                for _ in range(self.batches):
                    next(fetcher)
            except StopIteration as error:
                raise UserError(
                    f"The loader has fewer batches than the {self.batches} that were trained on in this epoch. Take the"
                    " one that the training began with."
                ) from error
            fetcher.fetched -= self.batches  # which Lightning adds
        return moved or self.batches > 0

    def epoch_begins(self, trainer: pl.Trainer) -> None:
        """Just before Lightning makes the loader begin an epoch, unless it is the first of this fit."""
        fit = trainer.fit_loop
        if trainer.current_epoch > 0 and not fit.is_resuming and not fit.epoch_loop.restarting:
            self.batches, self.drawn = 0, generator_of(trainer.train_dataloader).get_state()

    def known(self, trainer: pl.Trainer) -> tuple[int, Tensor | None]:
        """What a checkpoint keeps of it."""
        loader = trainer.train_dataloader
        if loader is None or stateful(loader):
            return 0, None
        if not trainer.is_last_batch:
            return self.batches, self.drawn
        own = generator_of(loader)  # the next epoch draws from it as it is; torch's own state is kept anyhow
        return 0, None if own is torch.default_generator else own.get_state()


def stateful(loader: Any) -> bool:
    """Whether a loader knows its place itself."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def generator_of(loader: Any) -> torch.Generator:
    """What a loader draws its order from."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    return getattr(sampler, "generator", None) or torch.default_generator
