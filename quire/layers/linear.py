"""Linear maps: y = x W^T + b, and the one from channels to the vocabulary."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.layers.layer import Layer, add_grad, add_product


class Linear(Layer):
    """y = x W^T + b, for x of shape (..., inputs); parameters named and shaped as in torch.nn.Linear."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        self.save(x)
        return F.linear(x, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        # dL/dW = sum over rows of grad^T x,  dL/db = sum over rows of grad,  dL/dx = grad W
        (x,) = self.saved()
        rows = grad.flatten(0, -2)  # (N, outputs)
        add_product(self.weight, rows, x.flatten(0, -2))
        if self.bias is not None:
            add_grad(self.bias, rows.sum(0))
        return grad @ self.weight


class OutputHead(Linear):
    """logits = x W^T, for W (V, C) without a bias; in training, of a size that the hardware likes.

    Matrix kernels work in tiles and on aligned rows: a vocabulary of 50,257 runs slower than one of 50,304. So where
    logits go straight into a loss they may be `padded`: V is rounded up, and the columns past it, whose weights are
    zero, are -infinity, which is a probability of exactly 0. Nothing but that product ever sees them: the parameter
    and its gradient have V rows, and so have checkpoint and optimizer.
    """

    MULTIPLE, WORTH_IT = 64, 1024  # V is rounded up to this; from this V on

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.missing = -outputs % self.MULTIPLE if outputs >= self.WORTH_IT else 0

    def forward(self, x: Tensor, padded: bool = False) -> Tensor:
        if not padded or not self.missing:
            return super().forward(x)
        self.save(x)
        hidden = F.pad(x.new_zeros(len(self.weight)), (0, self.missing), value=-math.inf)
        return F.linear(x, F.pad(self.weight, (0, 0, 0, self.missing)), hidden)

    def backward(self, grad: Tensor) -> Tensor:
        # Where the probability is 0, so is the gradient of a padded column: nothing is lost by leaving it out.
        return super().backward(grad[..., : len(self.weight)])
