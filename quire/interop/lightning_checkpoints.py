"""Checkpoints of a LanguageModel as Lightning reads and writes them: checked before anything of them is used."""

from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from torch import nn

from quire.config import Table, to_table
from quire.errors import UserError
from quire.interop.lightning_runs import KEY, PREFIX, contents
from quire.models import ModelSettings


class Checked(CheckpointIO):
    """Writes as a Trainer's `own` does, and reads by it what is whole, and tensors and plain values only."""

    def __init__(self, own: CheckpointIO) -> None:
        self.own = own

    def save_checkpoint(self, checkpoint: Table, path: Any, storage_options: Any = None) -> None:
        """As the Trainer's own."""
        self.own.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Table:
        """What is damaged, or more than plain values, is a UserError."""
        return contents(path, self.own)

    def remove_checkpoint(self, path: Any) -> None:
        """As the Trainer's own."""
        self.own.remove_checkpoint(path)

    def teardown(self) -> None:
        """As the Trainer's own."""
        self.own.teardown()


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied weights, each with the first one."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if name != first[id(parameter)]}


def check_model(checkpoint: Table, settings: ModelSettings, model: nn.Module) -> None:
    """Refuse a checkpoint of another model than this one."""
    if not isinstance(checkpoint.get(KEY), dict):
        raise UserError(
            "The checkpoint is not of a LanguageModel of quire.interop.lightning: Quire's part is not there."
        )
    here = {PREFIX + name: tensor.shape for name, tensor in model.state_dict().items()}
    there = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items() if name.startswith(PREFIX)}
    if wrong := [name for name in {**here, **there} if here.get(name) != there.get(name)]:
        own, other = to_table(settings), checkpoint[KEY]["model"]
        names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
        differs = ", ".join(f"{name} {other.get(name)} (here {own.get(name)})" for name in names)
        raise UserError(
            f"The checkpoint is of another model: {differs or f'{wrong[0]} is not the same'}."
            " LanguageModel.load_from_checkpoint(PATH) makes the one that it is of."
        )


def arguments_of(checkpoint: Table, kind: type) -> Table:
    """What `kind` is built from, where the checkpoint is of a subclass: each is a LanguageModel of its settings too."""
    takes, given = "model" in signature(kind).parameters, checkpoint.get("hyper_parameters", {})
    if takes and "model" not in given and KEY in checkpoint:
        return {name: checkpoint[KEY][name] for name in ("model", "training")}
    if not takes and "model" in given:
        raise UserError(
            f"The checkpoint is of a LanguageModel, not of a {kind.__name__}: LanguageModel.load_from_checkpoint(PATH)"
        )
    return {}


def is_local(path: Any) -> bool:
    """Whether a path names something on this machine, which can be looked at first."""
    return isinstance(path, (str, Path)) and "://" not in str(path)
