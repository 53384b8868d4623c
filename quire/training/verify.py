"""The proof that stopping changes nothing: the same steps twice, once through a checkpoint, compared bit by bit."""

from collections.abc import Callable
from pathlib import Path

import torch

from quire import checkpoint
from quire.training import state as states
from quire.training.loop import Trainer


def first_difference(trainer: Callable[[], Trainer], folder: Path, steps: int) -> str | None:
    """Train `steps` from where each `trainer()` stands, straight and through a stop; the first part that differs.

    `folder` takes the checkpoint of the stop. None: every weight, optimizer and generator state is equal.
    """
    straight = _after(trainer(), steps)
    stopped = trainer()
    _after(stopped, steps // 2)
    states.save(folder, stopped.state, stopped.model, stopped.optimizers, stopped.scaler)
    resumed = trainer()
    resumed.state = states.restore(checkpoint.load(folder), folder, resumed.model, resumed.optimizers, resumed.scaler)
    through = _after(resumed, steps - steps // 2)
    return next((name for name in straight if not torch.equal(straight[name], through[name])), None)


def _after(trainer: Trainer, steps: int) -> dict[str, torch.Tensor]:
    trainer.wrap_model()
    for _ in range(steps):
        trainer.update()
    return everything(trainer)


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What must be equal where two trainings are the same, as tensors by name."""
    copies = {name: tensor.to("cpu", copy=True) for name, tensor in trainer.saving.tensors().items()}
    state, cursor = trainer.state, trainer.state.cursor
    return {**copies, "cursor": torch.tensor([state.stage, cursor.epoch, cursor.position, state.step])}
