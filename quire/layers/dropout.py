"""Dropout: while training, each number is zeroed with probability p and the rest grow by 1 / (1 - p)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.layers.layer import Layer


class Dropout(Layer):
    """Srivastava et al. 2014. Draws from torch's default generator; on a CPU alike whether recording or not."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            self.save(None)
            return x
        if self.tape is None:
            return F.dropout(x, self.p)
        keep = torch.empty_like(x).bernoulli_(1 - self.p) / (1 - self.p)
        self.save(keep)
        return x * keep

    def backward(self, grad: Tensor) -> Tensor:
        (keep,) = self.saved()
        return grad if keep is None else grad * keep
