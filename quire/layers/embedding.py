"""A table of vectors, one row for each id."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.layers.layer import Layer


class Embedding(Layer):
    """Row lookup: ids (...) of integers below `count` give vectors (..., size); named as in torch.nn.Embedding."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        self.save(ids)
        return F.embedding(ids, self.weight)

    def backward(self, grad: Tensor) -> None:
        # Each row's gradient is the sum over every place where its id stood: a repeated id adds up.
        (ids,) = self.saved()
        if not self.weight.requires_grad:
            return
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        with torch.no_grad():
            self.weight.grad.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(self.weight.dtype))
