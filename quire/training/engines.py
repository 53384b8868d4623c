"""Who fills in the gradients: autograd, or the layers' own hand-written backward. Nothing else learns which.

An engine's `backpropagate(model, batch, scale)` adds scale times the gradient of the batch's mean loss to every
parameter's `.grad`, and gives that loss, not scaled. Its forward is a call of the model itself, never of a method, so
that wrappers (compilation, data parallelism) work.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quire.data.batches import Batch
from quire.layers.layer import recording


class Engine(Protocol):
    """See the module's description."""

    def backpropagate(self, model: nn.Module, batch: Batch, scale: float) -> Tensor:
        """Add scale times the gradient of the batch's mean loss to every `.grad`; gives the loss, a scalar."""
        ...


class Autograd:
    """PyTorch's automatic differentiation."""

    def backpropagate(self, model: nn.Module, batch: Batch, scale: float) -> Tensor:
        loss = model(**batch.arguments())
        (loss * scale).backward()
        return loss.detach()


class Manual:
    """Each layer's `backward`, written by hand beside its forward."""

    def backpropagate(self, model: Any, batch: Batch, scale: float) -> Tensor:
        with torch.no_grad(), recording(model):
            loss = model(**batch.arguments())
            model.backward(scale)
        return loss


ENGINES: dict[str, Engine] = {"autograd": Autograd(), "manual": Manual()}
