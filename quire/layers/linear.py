"""Linear maps: y = x W^T + b, and the one from channels to the vocabulary."""

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
    """logits = x W^T, for W (V, C) without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
