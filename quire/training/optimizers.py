"""From gradients to steps. To add one: a function, and a line in OPTIMIZERS.

Each takes the model and the training settings and gives the optimizers that share its parameters between them; n-gram
tables have one of their own beside any. A parameter group's "peak" is its learning rate before the schedule's share is
applied.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quire.layers.embedding import Embedding
from quire.layers.ngram_embedding import NgramEmbedding
from quire.training.adagrad import RowAdagrad
from quire.training.eager import SGD, Adam, AdamW
from quire.training.muon import Muon

if TYPE_CHECKING:
    from quire.training.settings import TrainingSettings

Optimizers = list[torch.optim.Optimizer]


def adamw(model: nn.Module, settings: "TrainingSettings") -> Optimizers:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); torch's fused kernel where there is one."""
    return [_adamw(split_tables(model)[1], settings), *_adagrad(model, settings)]


def adam(model: nn.Module, settings: "TrainingSettings") -> Optimizers:
    """Adam (Kingma and Ba 2015); weight decay as L2 in the gradient."""
    betas = (settings.beta1, settings.beta2)
    groups = _decayed(split_tables(model)[1], settings)
    return [Adam(groups, lr=settings.learning_rate, betas=betas), *_adagrad(model, settings)]


def sgd(model: nn.Module, settings: "TrainingSettings") -> Optimizers:
    """Stochastic gradient descent with momentum; weight decay as L2 in the gradient."""
    groups = _decayed(split_tables(model)[1], settings)
    optimizer = SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return [optimizer, *_adagrad(model, settings)]


def muon(model: nn.Module, settings: "TrainingSettings") -> Optimizers:
    """Muon for the matrices between embedding and output head, AdamW for the rest."""
    matrices, rest = split_matrices(model)
    group = {"params": matrices, "peak": settings.matrix_learning_rate}
    return [
        Muon([group], settings.matrix_learning_rate, settings.weight_decay, settings.momentum),  # type: ignore[list-item]
        _adamw(rest, settings),
        *_adagrad(model, settings),
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module, "TrainingSettings"], Optimizers]] = {
    "adamw": adamw,
    "adam": adam,
    "sgd": sgd,
    "muon": muon,
}


def split_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that Muon takes (matrices that map channels to channels), and the others but n-gram tables.

    Rows of an embedding or of the output head belong to single tokens: orthogonalizing them mixes what is apart.
    """
    apart = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    if isinstance(head := getattr(model, "head", None), nn.Module):
        apart.update(id(p) for p in head.parameters())
    parameters = split_tables(model)[1]
    matrices = [p for p in parameters if p.dim() == 2 and id(p) not in apart]
    taken = {id(p) for p in matrices}
    return matrices, [p for p in parameters if id(p) not in taken]


def split_tables(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The n-gram tables, and all other parameters: what is clipped, and what the main optimizer takes."""
    tables = [module.weight for module in model.modules() if isinstance(module, NgramEmbedding)]
    taken = {id(p) for p in tables}
    return tables, [p for p in model.parameters() if id(p) not in taken]


def set_learning_rates(optimizers: Optimizers, share: float) -> None:
    """Every group's learning rate becomes `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share


def _adagrad(model: nn.Module, settings: "TrainingSettings") -> Optimizers:
    tables, peak = split_tables(model)[0], settings.table_learning_rate
    return [RowAdagrad([{"params": tables, "peak": peak}], peak)] if tables else []


def _adamw(parameters: list[nn.Parameter], settings: "TrainingSettings") -> torch.optim.Optimizer:
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.dtype.is_floating_point for p in parameters)
    betas = (settings.beta1, settings.beta2)
    return AdamW(_decayed(parameters, settings), lr=settings.learning_rate, betas=betas, fused=fused)


def _decayed(parameters: list[nn.Parameter], settings: "TrainingSettings") -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases and normalization weights without."""
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    peak = settings.learning_rate
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay, "peak": peak},
        {"params": vectors, "weight_decay": 0.0, "peak": peak},
    ]
    return [group for group in groups if group["params"]]
