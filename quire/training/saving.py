"""The checkpoints `best` and `last` of a training, written by one process, or by each its own part."""

from pathlib import Path
from typing import Any

from torch import nn

from quire import checkpoint
from quire.run import Run
from quire.training import state as states
from quire.training.distributed import World
from quire.training.optimizers import Optimizers
from quire.training.settings import TrainingSettings
from quire.training.sharded import Shards
from quire.training.state import TrainingState


class Saving:
    """Writes and reads the state of a training; of several processes all call it."""

    def __init__(
        self, run: Run, model: nn.Module, optimizers: Optimizers, scaler: Any, world: World, settings: TrainingSettings
    ) -> None:
        self.run, self.model, self.optimizers, self.scaler, self.world = run, model, optimizers, scaler, world
        self.shards = Shards(world, settings.timeout) if settings.parallel == "fsdp" else None
        self.best_table: dict[str, Any] | None = None  # the state of the checkpoint `best`, where this process wrote it

    def save(self, which: str, state: TrainingState) -> None:
        """Write the checkpoint `best` or `last`; the second that is written of one state is the first one's files."""
        table, folder, best = state.to_table(), self.run.folder(which), self.run.folder("best")
        again = which == "last" and self.best_table == table
        if self.shards and again:
            self.shards.save_again(folder, best)
        elif self.shards:
            self.shards.save(folder, self.tensors(), table)
        elif again and self.world.leads:
            checkpoint.save_again(folder, best)
        elif not again:
            states.save(folder, state, self.model, self.optimizers, self.scaler, self.world)
        if which == "best":
            self.best_table = table

    def tensors(self) -> checkpoint.Tensors:
        """Weights, optimizer state and random generators; of what is sharded this process's parts."""
        weights = {f"model.{name}": tensor.detach() for name, tensor in checkpoint.model_tensors(self.model).items()}
        return {**weights, **states.training_tensors(self.model, self.optimizers, self.scaler, self.world)}

    def load(self, folder: Path) -> TrainingState:
        """Put the checkpoint in `folder` into model and optimizers; gives its state."""
        if self.shards and checkpoint.is_sharded(folder):
            table, rest = self.shards.load(folder, self.model)
            states.restore_training_tensors(rest, self.model, self.optimizers, self.scaler, self.world)
            return TrainingState.from_table(table)
        found = checkpoint.load(folder)
        return states.restore(found, folder, self.model, self.optimizers, self.scaler, self.world)

    def finish(self) -> None:
        """Wait until all that was saved has reached the disk, whichever process writes it: torchrun soon kills the
        others of a process that has ended."""
        if self.shards:
            self.shards.finish()
        self.world.assemble()
